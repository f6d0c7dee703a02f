//! One question to one name server: the IPv4 addresses of a name.
//!
//! Invariant: an answer counts only if it is to the question that was asked; every length in it is checked
//! against what is left, and a name's pointers lead nowhere: names in answers are skipped, not followed.

use anyhow::{Context, bail};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

/// One try.
const LIMIT: Duration = Duration::from_secs(2);
const TRIES: usize = 2;
const TYPE_A: u16 = 1;
const CLASS_IN: u16 = 1;

/// The question as a message.
fn question(id: u16, name: &str) -> anyhow::Result<Vec<u8>> {
    // Recursion is desired; one question.
    let mut message = Vec::from(id.to_be_bytes());
    message.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.split('.').filter(|label| !label.is_empty()) {
        let length = u8::try_from(label.len()).ok().filter(|length| *length < 64);
        message.push(length.with_context(|| format!("`{name}` is no name for a name server"))?);
        message.extend(label.as_bytes());
    }
    message.push(0);
    message.extend(TYPE_A.to_be_bytes());
    message.extend(CLASS_IN.to_be_bytes());
    Ok(message)
}

/// What is left of a message.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn take(&mut self, len: usize) -> anyhow::Result<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len).context("it ends too early")?;
        self.0 = rest;
        Ok(taken)
    }

    fn u16(&mut self) -> anyhow::Result<u16> {
        let bytes: [u8; 2] = self.take(2)?.try_into()?;
        Ok(u16::from_be_bytes(bytes))
    }

    fn skip_name(&mut self) -> anyhow::Result<()> {
        loop {
            match self.take(1)?.first().copied().unwrap_or(0) {
                0 => return Ok(()),
                // A pointer ends a name.
                length if length & 0xc0 == 0xc0 => return self.take(1).map(drop),
                length if length & 0xc0 == 0 => drop(self.take(length.into())?),
                _ => bail!("a name in it is none"),
            }
        }
    }
}

/// The addresses in an answer to a question.
fn answer(question: &[u8], message: &[u8]) -> anyhow::Result<Vec<Ipv4Addr>> {
    let mut rest = Rest(message);
    let (id, flags) = (rest.take(2)?, rest.u16()?);
    let (questions, answers) = (rest.u16()?, rest.u16()?);
    rest.take(4)?;
    if question.get(..2) != Some(id) || flags & 0x8000 == 0 || questions != 1 {
        bail!("it answers another question");
    }
    match flags & 0xf {
        0 => {}
        3 => bail!("it knows no such name"),
        code => bail!("it refuses the question (code {code})"),
    }
    let asked = question.get(12..).unwrap_or_default();
    if !rest.take(asked.len())?.eq_ignore_ascii_case(asked) {
        bail!("it answers another question");
    }
    let mut found = Vec::new();
    for _ in 0..answers {
        rest.skip_name()?;
        let (kind, class) = (rest.u16()?, rest.u16()?);
        rest.take(4)?; // how long it holds
        let length = rest.u16()?;
        let data = rest.take(length.into())?;
        if let (TYPE_A, CLASS_IN, Ok(bytes)) = (kind, class, <[u8; 4]>::try_from(data)) {
            found.push(Ipv4Addr::from(bytes));
        }
    }
    Ok(found)
}

/// Asks a name server for the addresses of a name.
pub fn addresses(server: SocketAddr, name: &str) -> anyhow::Result<Vec<Ipv4Addr>> {
    if let Ok(ip) = name.parse() {
        return Ok(vec![ip]);
    }
    let any: SocketAddr = match server {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (std::net::Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any)?;
    socket.connect(server)?;
    let id = uuid::Uuid::new_v4().into_bytes();
    let question = question(u16::from_be_bytes([id[0], id[1]]), name)?;
    let mut last = anyhow::anyhow!("it does not answer");
    for _ in 0..TRIES {
        let end = Instant::now() + LIMIT;
        if let Err(error) = socket.send(&question) {
            last = error.into();
            continue;
        }
        let mut message = [0; 1500];
        // What does not fit the question is somebody else's word.
        while let Some(left) = end.checked_duration_since(Instant::now()) {
            socket.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
            match socket.recv(&mut message) {
                Ok(n) => match answer(&question, message.get(..n).unwrap_or_default()) {
                    Ok(found) => return Ok(found),
                    Err(error) => last = error,
                },
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(error) => {
                    last = error.into();
                    break;
                }
            }
        }
    }
    Err(last)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn reply(question: &[u8], records: &[&[u8]]) -> Vec<u8> {
        let mut message = question.to_vec();
        message[2] |= 0x80;
        message[7] = u8::try_from(records.len()).unwrap();
        for record in records {
            message.extend(*record);
        }
        message
    }

    /// A pointer to the question's name, type, class, 60 s, and the data with its length.
    fn record(kind: u8, data: &[u8]) -> Vec<u8> {
        let length = u8::try_from(data.len()).unwrap();
        let head = [0xc0, 12, 0, kind, 0, 1, 0, 0, 0, 60, 0, length];
        [&head, data].concat()
    }

    #[test]
    fn addresses_are_read_and_other_records_passed_over() {
        let asked = question(7, "msa.example.org").unwrap();
        let (alias, a) = (record(5, b"\x01x\x00"), record(1, &[10, 0, 0, 5]));
        let found = answer(&asked, &reply(&asked, &[&alias, &a])).unwrap();
        assert_eq!(found, [Ipv4Addr::new(10, 0, 0, 5)]);
    }

    #[test]
    fn what_is_cut_or_no_answer_to_the_question_is_refused() {
        let asked = question(7, "msa.example.org").unwrap();
        let whole = reply(&asked, &[&record(1, &[10, 0, 0, 5])]);
        for end in 0..whole.len() {
            assert!(answer(&asked, &whole[..end]).is_err(), "cut at {end}");
        }
        for other in [
            question(8, "msa.example.org"),
            question(7, "msb.example.org"),
        ] {
            assert!(answer(&asked, &reply(&other.unwrap(), &[])).is_err());
        }
        assert!(answer(&asked, &asked).is_err(), "a question is no answer");
        let mut unknown = whole.clone();
        unknown[3] |= 3;
        let error = answer(&asked, &unknown).unwrap_err().to_string();
        assert!(error.contains("no such name"), "{error}");
        let mut hostile = whole;
        let at = asked.len();
        hostile[at] = 0x80;
        assert!(answer(&asked, &hostile).is_err());
    }

    #[test]
    fn a_name_of_long_labels_is_refused() {
        assert!(question(1, &"a".repeat(64)).is_err());
    }
}
