//! An invitation: what a part that has no certificate needs to get one, on one line.
//!
//! `<server's address> <SHA-256 of the authority's certificate, PEM> <token>`. Who hands it over is the host
//! or a person; the authority's certificate is then believed by its digest, and the server by that.
//!
//! Invariant: an invitation is looked at only while this part has no certificate that is in force, and what it
//! leads to lies in the folder as if a person had laid it there: authority, server, and the token last.

use crate::http::{Server, fetch_authority};
use crate::steps::EnrolError;
use std::fmt;
use std::io;
use tls::Folder;

/// No line of this kind is longer.
pub const MAX_BYTES: usize = 1024;

/// An invitation.
#[derive(Clone, PartialEq, Eq)]
pub struct Invitation {
    server: Server,
    authority_sha256: [u8; 32],
    token: String,
}

/// The token is not for logs.
impl fmt::Debug for Invitation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an invitation by {}", self.server)
    }
}

fn digest(hex: &str) -> Option<[u8; 32]> {
    let mut out = [0; 32];
    if hex.len() != 64 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    for (at, byte) in out.iter_mut().enumerate() {
        *byte = u8::from_str_radix(hex.get(2 * at..2 * at + 2)?, 16).ok()?;
    }
    Some(out)
}

impl Invitation {
    /// Reads it.
    pub fn parse(line: &str) -> Result<Self, String> {
        let form = "write: <https://server:port> <SHA-256 of ca.pem> <token>";
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let [server, pin, token] = words.as_slice() else {
            return Err(form.into());
        };
        if line.len() > MAX_BYTES || !token.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(form.into());
        }
        let authority_sha256 = digest(pin).ok_or(form)?;
        Ok(Self {
            server: server.parse()?,
            authority_sha256,
            token: (*token).to_owned(),
        })
    }

    /// Fetches the authority's certificate, and lays what enrolling takes into the folder.
    pub fn accept(&self, folder: &Folder) -> Result<(), EnrolError> {
        let authority = fetch_authority(&self.server, &self.authority_sha256)?;
        tls::files::certificates_of(&authority, "the authority's certificate")?;
        folder.write(&folder.authority(), &authority)?;
        folder.write(&folder.msa(), self.server.to_string().as_bytes())?;
        folder.write(&folder.token(), self.token.as_bytes())?;
        Ok(())
    }
}

/// Where invitations come from.
pub trait Invitations: Send {
    /// The one that is there.
    fn look(&mut self) -> io::Result<Option<String>>;
    /// It is of no more use: nobody need read it any more.
    fn clear(&mut self) -> io::Result<()>;
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn it_is_read_whole_or_refused() {
        let pin = "0f".repeat(32);
        let read =
            Invitation::parse(&format!("https://msa.example.org:8443 {pin} jde_1\n")).unwrap();
        assert_eq!(read.server, Server::new("msa.example.org", 8443));
        assert_eq!(
            (read.authority_sha256, read.token.as_str()),
            ([15; 32], "jde_1")
        );
        assert!(!format!("{read:?}").contains("jde_1"));
        for bad in [
            String::new(),
            "https://msa".into(),
            format!("https://msa {pin}"),
            format!("http://msa {pin} t"),
            format!("https://msa {}x t", &pin[1..]),
            format!("https://msa {}\u{e9} t", &pin[2..]),
            format!("https://msa {pin} t more"),
            format!("https://msa {pin} {}", "t".repeat(MAX_BYTES)),
            format!("https://msa {pin} t\u{7f}"),
        ] {
            assert!(Invitation::parse(&bad).is_err(), "{bad}");
        }
    }
}
