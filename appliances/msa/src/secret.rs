//! Secrets: tokens, and the hashes by which tokens and passwords are kept.
//!
//! Invariant: what is kept cannot be turned back into what it was made from. A token has 256 random
//! bits, so that a plain SHA-256 does; a password gets Argon2id with a salt of its own.

use crate::text::Password;
use argon2::password_hash::phc::PasswordHash;
use argon2::{Algorithm, Argon2, Params, PasswordHasher, PasswordVerifier, Version};
use sha2::{Digest, Sha256};
use std::fmt::Write as _;

/// Why no secret could be made.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The system gives no random numbers.
    #[error("the system gives no random numbers")]
    Random,
    /// Argon2 refused.
    #[error("the password cannot be hashed: {0}")]
    Hash(String),
}

/// Random bytes for keys, salts and serial numbers.
pub fn random<const N: usize>() -> Result<[u8; N], SecretError> {
    let mut bytes = [0; N];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| SecretError::Random)?;
    Ok(bytes)
}

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Bytes of lower-case hexadecimal digits; nothing, if it is none of that.
pub fn unhex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) {
        return None;
    }
    let digit = |c: u8| match c {
        b'0'..=b'9' => Some(c - b'0'),
        b'a'..=b'f' => Some(c - b'a' + 10),
        _ => None,
    };
    let pairs = text.as_bytes().chunks_exact(2);
    pairs
        .map(|pair| match pair {
            [high, low] => Some(digit(*high)? << 4 | digit(*low)?),
            _ => None,
        })
        .collect()
}

/// A token: shown once, to whom it is for.
pub fn token(prefix: &str) -> Result<String, SecretError> {
    Ok(format!("{prefix}_{}", hex(&random::<32>()?)))
}

/// SHA-256, as hexadecimal digits.
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Hashes passwords. Costs about 20 ms and `memory_kib` of memory each time.
pub struct Passwords {
    argon2: Argon2<'static>,
    /// Of no password: who asks for a user that is not there waits as long as anybody.
    nobody: String,
}

impl Passwords {
    /// With this cost: 19456 KiB and 2 passes is what OWASP asks for at least.
    pub fn new(memory_kib: u32, passes: u32) -> Result<Self, SecretError> {
        let bad = |error: argon2::Error| SecretError::Hash(error.to_string());
        let params = Params::new(memory_kib, passes, 1, None).map_err(bad)?;
        let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
        let mut passwords = Self {
            argon2,
            nobody: String::new(),
        };
        passwords.nobody = passwords.hash_bytes(&random::<32>()?)?;
        Ok(passwords)
    }

    fn hash_bytes(&self, bytes: &[u8]) -> Result<String, SecretError> {
        let salt: [u8; 16] = random()?;
        let hash: PasswordHash = self
            .argon2
            .hash_password_with_salt(bytes, &salt)
            .map_err(|error| SecretError::Hash(error.to_string()))?;
        Ok(hash.to_string())
    }

    /// What is kept of a password.
    pub fn hash(&self, password: &Password) -> Result<String, SecretError> {
        self.hash_bytes(password.as_bytes())
    }

    /// Whether it is the password of this hash. Without a hash the answer is no, as late as otherwise.
    pub fn verify(&self, password: &Password, hash: Option<&str>) -> bool {
        let kept = hash.unwrap_or(&self.nobody);
        let Ok(parsed) = PasswordHash::new(kept) else {
            return false;
        };
        let right = self
            .argon2
            .verify_password(password.as_bytes(), &parsed)
            .is_ok();
        right && hash.is_some()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_password_is_known_by_its_hash_only() {
        let passwords = Passwords::new(64, 1).unwrap();
        let password = |text: &str| Password::try_from(text.to_owned()).unwrap();
        let right = password("correct horse battery");
        let hash = passwords.hash(&right).unwrap();
        assert!(hash.starts_with("$argon2id$v=19$m=64,t=1,p=1$"), "{hash}");
        assert!(passwords.verify(&right, Some(&hash)));
        assert!(!passwords.verify(&password("correct horse batterz"), Some(&hash)));
        assert!(!passwords.verify(&right, None));
        assert!(!passwords.verify(&right, Some("damaged")));
        assert_ne!(passwords.hash(&right).unwrap(), hash, "no salt");
    }

    #[test]
    fn hexadecimal_there_and_back() {
        assert_eq!(hex(&[0, 0xaf, 9]), "00af09");
        assert_eq!(unhex("00af09"), Some(vec![0, 0xaf, 9]));
        assert_eq!(unhex("0"), None);
        assert_eq!(unhex("0G"), None);
        assert_eq!(unhex("AF"), None);
        let (one, two) = (token("jdr").unwrap(), token("jdr").unwrap());
        assert_eq!(one.len(), 4 + 64);
        assert_ne!(one, two);
    }
}
