//! Options of one device: `key=value,key=value`, as on other monitors' command lines.
//!
//! In: text. Out: values by key. Holds: a key that nobody asked for, or one that is there twice, is refused by name.

use std::collections::BTreeMap;

/// Text that is no list of options, or not the right ones.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionsError {
    /// Not `key=value`.
    #[error("`{0}`: expected key=value")]
    NotAPair(String),
    /// A key that is there twice.
    #[error("`{0}` is given twice")]
    Twice(String),
    /// A key that means nothing here.
    #[error("unknown option `{key}`: expected {expected}")]
    Unknown {
        /// The key.
        key: String,
        /// Those there are.
        expected: String,
    },
    /// A key that must be there.
    #[error("`{0}=` is missing")]
    Missing(&'static str),
    /// A value that is none of those that the key can have.
    #[error("{key}={value}: expected {expected}")]
    BadValue {
        /// The key.
        key: &'static str,
        /// What was given.
        value: String,
        /// What could be given.
        expected: &'static str,
    },
}

/// Options that were given, each to be taken once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options(BTreeMap<String, String>);

impl Options {
    /// Reads `text`. A first part without `=` is the value of `first`, for users who give a path or a name alone.
    ///
    /// # Errors
    /// A part that is no pair, or a key twice.
    pub fn parse(text: &str, first: &'static str) -> Result<Self, OptionsError> {
        let mut options = BTreeMap::new();
        for (index, part) in text.split(',').enumerate() {
            let (key, value) = match part.split_once('=') {
                Some(pair) => pair,
                None if index == 0 && !part.is_empty() => (first, part),
                None => return Err(OptionsError::NotAPair(part.to_owned())),
            };
            if options.insert(key.to_owned(), value.to_owned()).is_some() {
                return Err(OptionsError::Twice(key.to_owned()));
            }
        }
        Ok(Self(options))
    }

    /// Takes the value of `key`.
    pub fn take(&mut self, key: &str) -> Option<String> {
        self.0.remove(key)
    }

    /// Takes the value of `key`, which must be there.
    ///
    /// # Errors
    /// It isn't, or is empty.
    pub fn need(&mut self, key: &'static str) -> Result<String, OptionsError> {
        self.take(key).filter(|value| !value.is_empty()).ok_or(OptionsError::Missing(key))
    }

    /// Takes a switch: `on` or `off`, and off when it isn't there.
    ///
    /// # Errors
    /// Any other value.
    pub fn switch(&mut self, key: &'static str) -> Result<bool, OptionsError> {
        match self.take(key).as_deref() {
            None | Some("off") => Ok(false),
            Some("on") => Ok(true),
            Some(value) => {
                Err(OptionsError::BadValue { key, value: value.to_owned(), expected: "on or off" })
            }
        }
    }

    /// Nothing is left. `expected` names the keys there are.
    ///
    /// # Errors
    /// Something is.
    pub fn done(self, expected: &str) -> Result<(), OptionsError> {
        match self.0.into_keys().next() {
            Some(key) => Err(OptionsError::Unknown { key, expected: expected.to_owned() }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read() {
        let mut options = Options::parse("disk.img,readonly=on,id=root", "path").unwrap();
        assert_eq!(options.need("path").unwrap(), "disk.img");
        assert!(options.switch("readonly").unwrap());
        assert_eq!(options.take("id").as_deref(), Some("root"));
        assert_eq!(options.done("path, id, readonly"), Ok(()));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let parse = |text| Options::parse(text, "path");
        assert_eq!(parse("path=a,b"), Err(OptionsError::NotAPair("b".into())));
        assert_eq!(parse(""), Err(OptionsError::NotAPair(String::new())));
        assert_eq!(parse("a,path=b"), Err(OptionsError::Twice("path".into())));
        assert_eq!(parse("id=x").unwrap().need("path"), Err(OptionsError::Missing("path")));
        assert!(parse("readonly=maybe").unwrap().switch("readonly").is_err());
        let unknown = parse("a,size=3").unwrap().done("path").unwrap_err();
        assert_eq!(unknown.to_string(), "unknown option `path`: expected path");
    }
}
