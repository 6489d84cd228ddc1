//! Ethernet addresses.
//!
//! In: text, six bytes of a snapshot, or random ones. Out: an address. Holds: an address that an interface may have is
//! asked for by [`Mac::checked`], wherever it came from.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// An Ethernet address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Mac(pub [u8; 6]);

/// Text or bytes that are no interface's address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MacError {
    /// Not six pairs of digits.
    #[error(
        "`{0}` is no MAC address: expected six pairs of hexadecimal digits, for example 52:54:00:12:34:56"
    )]
    NotAMac(String),
    /// The address of a group, or of nobody.
    #[error(
        "{0} cannot be an interface's MAC address: expected one that isn't zero and whose first byte is even"
    )]
    NotUnicast(Mac),
}

impl Mac {
    /// A locally administered address made of random bytes (IEEE 802, section 8.2).
    pub fn from_random(mut bytes: [u8; 6]) -> Self {
        bytes[0] = bytes[0] & 0xfc | 2;
        Self(bytes)
    }

    /// This address, if it is one that an interface may have.
    ///
    /// # Errors
    /// The address of a group, or all zeroes.
    pub fn checked(self) -> Result<Self, MacError> {
        if self.0[0] & 1 != 0 || self.0 == [0; 6] { Err(MacError::NotUnicast(self)) } else { Ok(self) }
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let pair = |pair: &str| {
            let digits = pair.len() == 2 && pair.bytes().all(|digit| digit.is_ascii_hexdigit());
            digits.then(|| u8::from_str_radix(pair, 16).ok()).flatten()
        };
        let bytes: Option<Vec<u8>> = text.split(':').map(pair).collect();
        let bytes: Option<[u8; 6]> = bytes.and_then(|bytes| bytes.try_into().ok());
        bytes.map(Mac).ok_or_else(|| MacError::NotAMac(text.to_owned()))?.checked()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_back() {
        let mac: Mac = "52:54:00:aB:00:ff".parse().unwrap();
        assert_eq!(mac, Mac([0x52, 0x54, 0, 0xab, 0, 0xff]));
        assert_eq!(mac.to_string(), "52:54:00:ab:00:ff");
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in ["", "52:54:00:ab:00", "52:54:00:ab:00:ff:01", "52-54-00-ab-00-ff", "+2:54:00:ab:00:ff"] {
            assert!(matches!(text.parse::<Mac>(), Err(MacError::NotAMac(_))), "{text}");
        }
        for text in ["01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00"] {
            assert!(matches!(text.parse::<Mac>(), Err(MacError::NotUnicast(_))), "{text}");
        }
    }

    #[test]
    fn a_random_address_is_locally_administered() {
        for byte in 0..=255 {
            let mac = Mac::from_random([byte; 6]);
            assert_eq!((mac.0[0] & 3, mac.checked()), (2, Ok(mac)));
        }
    }
}
