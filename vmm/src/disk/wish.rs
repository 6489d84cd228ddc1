//! What a user asks for: `--disk` of `vmm run`, and of `vmm restore`.
//!
//! In: text. Out: a path and how it is to be used. Holds: an id can be part of a file's name and of another option.

use super::{Disk, DiskError, DiskFile, EngineChoice};
use crate::options::{Options, OptionsError};
use devices::virtio::SERIAL_MAX;
use std::path::PathBuf;

/// The longest id.
const ID_MAX: usize = 32;

/// A disk for a new machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskWish {
    /// What its owner calls it; without a wish it is `disk0`, `disk1` and so on.
    pub id: Option<String>,
    /// The file or block device.
    pub path: PathBuf,
    /// Whether the guest may not write.
    pub read_only: bool,
    /// What the guest reads as serial number; the id without a wish.
    pub serial: Option<String>,
    /// How requests get there.
    pub engine: EngineChoice,
}

/// Another place for a disk of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskPlace {
    /// The disk's id.
    pub id: String,
    /// Where it is now, or where a copy of the kept one is to be made.
    pub path: PathBuf,
    /// How requests get there.
    pub engine: EngineChoice,
}

/// Text that names no disk.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WishError {
    /// Not a list of options.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// Not an id.
    #[error(
        "`{0}` is no disk id: expected 1 to {ID_MAX} letters, digits, `-`, `_` or `.`, the first a letter or a digit"
    )]
    Id(String),
    /// Not a serial number.
    #[error("serial={0}: expected 1 to {SERIAL_MAX} printable ASCII characters")]
    Serial(String),
    /// Not an id and a path.
    #[error("`{0}`: expected ID=PATH")]
    Place(String),
}

/// A disk that was asked for can't be had.
#[derive(Debug, thiserror::Error)]
#[error("disk `{id}`")]
pub struct DiskWishError {
    /// Which.
    pub id: String,
    /// Why.
    pub source: DiskError,
}

impl DiskWish {
    /// Reads `path=FILE,id=ID,readonly=on,serial=TEXT,engine=auto|uring|threads`; a path alone is enough.
    ///
    /// # Errors
    /// Text that is no such list.
    pub fn parse(text: &str) -> Result<Self, WishError> {
        let mut options = Options::parse(text, "path")?;
        let path = options.need("path")?.into();
        let read_only = options.switch("readonly")?;
        let id = options.take("id").map(|id| check_id(&id)).transpose()?;
        let serial = options.take("serial").map(check_serial).transpose()?;
        let engine = engine(options.take("engine"))?;
        options.done("path, id, readonly, serial, engine")?;
        Ok(Self { id, path, read_only, serial, engine })
    }

    /// What it is called, being the machine's disk of that number.
    pub fn id(&self, number: usize) -> String {
        self.id.clone().unwrap_or_else(|| format!("disk{number}"))
    }

    /// What the guest reads as serial number.
    pub fn serial(&self, number: usize) -> String {
        let serial = self.serial.clone().unwrap_or_else(|| self.id(number));
        serial.chars().take(SERIAL_MAX).collect()
    }

    /// Opens it.
    ///
    /// # Errors
    /// It is no disk, or somebody else's.
    pub fn open(&self, number: usize) -> Result<Disk, DiskWishError> {
        let file = DiskFile::open(&self.path, self.read_only);
        let file = file.map_err(|source| DiskWishError { id: self.id(number), source })?;
        Ok(Disk { id: self.id(number), file, engine: self.engine })
    }
}

impl DiskPlace {
    /// Reads `ID=PATH`, with `,engine=…` behind it if need be.
    ///
    /// # Errors
    /// Text that is no such pair.
    pub fn parse(text: &str) -> Result<Self, WishError> {
        let (place, chosen) = match text.split_once(",engine=") {
            Some((place, chosen)) => (place, Some(chosen.to_owned())),
            None => (text, None),
        };
        let pair = place.split_once('=').filter(|(_, path)| !path.is_empty());
        let (id, path) = pair.ok_or_else(|| WishError::Place(text.to_owned()))?;
        Ok(Self { id: check_id(id)?, path: path.into(), engine: engine(chosen)? })
    }
}

fn engine(text: Option<String>) -> Result<EngineChoice, OptionsError> {
    match text.as_deref() {
        None | Some("auto") => Ok(EngineChoice::Auto),
        Some("uring") => Ok(EngineChoice::Uring),
        Some("threads") => Ok(EngineChoice::Threads),
        Some(value) => Err(OptionsError::BadValue {
            key: "engine",
            value: value.to_owned(),
            expected: "auto, uring or threads",
        }),
    }
}

/// Ids are part of file names, so those of a snapshot are checked as well.
pub(super) fn check_id(id: &str) -> Result<String, WishError> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let begins = id.starts_with(|c: char| c.is_ascii_alphanumeric());
    if begins && id.len() <= ID_MAX && id.chars().all(fits) {
        return Ok(id.to_owned());
    }
    Err(WishError::Id(id.to_owned()))
}

fn check_serial(text: String) -> Result<String, WishError> {
    let fits = (1..=SERIAL_MAX).contains(&text.len()) && text.chars().all(|c| c.is_ascii_graphic());
    if fits { Ok(text) } else { Err(WishError::Serial(text)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_enough() {
        let wish = DiskWish::parse("/images/a.raw").unwrap();
        assert_eq!(
            (wish.path.to_str(), wish.read_only, wish.id(3)),
            (Some("/images/a.raw"), false, "disk3".into())
        );
        assert_eq!(wish.serial(3), "disk3");
    }

    #[test]
    fn every_option_is_read() {
        let wish = DiskWish::parse("path=a,id=root,readonly=on,serial=S1,engine=threads").unwrap();
        let expected = DiskWish {
            id: Some("root".into()),
            path: "a".into(),
            read_only: true,
            serial: Some("S1".into()),
            engine: EngineChoice::Threads,
        };
        assert_eq!(wish, expected);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let said = |text| DiskWish::parse(text).unwrap_err().to_string();
        assert_eq!(said("id=x"), "`path=` is missing");
        assert_eq!(said("a,engine=fast"), "engine=fast: expected auto, uring or threads");
        assert_eq!(said("a,size=1"), "unknown option `size`: expected path, id, readonly, serial, engine");
        assert!(said("a,id=../x").starts_with("`../x` is no disk id"));
        assert!(said("a,serial=123456789012345678901").contains("1 to 20 printable"));
    }

    #[test]
    fn a_place_is_an_id_and_a_path() {
        let place = DiskPlace::parse("root=/a=b").unwrap();
        assert_eq!((place.id.as_str(), place.path.to_str()), ("root", Some("/a=b")));
        assert_eq!(DiskPlace::parse("root=/a,engine=uring").unwrap().engine, EngineChoice::Uring);
        assert!(DiskPlace::parse("/a").is_err());
        assert!(DiskPlace::parse("root=").is_err());
    }
}
