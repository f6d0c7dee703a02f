//! The handshake: options, until the client goes over to transmission or away.
//!
//! Invariant: an option's data is read only after its length was checked; an unknown option is
//! answered, never a reason to hang up.

use super::engine::Engine;
use super::proto::{self, info, opt, rep, tflag};
use super::server::Exports;
use super::stream::{Stream, Timed};
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::Instant;

/// What was agreed.
#[derive(Clone)]
pub struct Agreed {
    /// The export.
    pub engine: Arc<dyn Engine>,
    /// Its name.
    pub export: String,
    /// Replies are structured.
    pub structured: bool,
    /// The client knows that zeros can be asked for that must be fast.
    pub fast_zero: bool,
    /// The client asked for `base:allocation` of this export.
    pub block_status: bool,
}

/// Why there is nothing to transmit.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The connection failed or ended.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The client broke the protocol.
    #[error("{0}")]
    Protocol(String),
    /// The client said good-bye.
    #[error("the client ended the handshake")]
    Aborted,
}

struct Talk<'a> {
    stream: Timed<'a>,
    exports: &'a Exports,
    structured: bool,
    /// Name of the export for which `base:allocation` was asked.
    context_for: Option<String>,
}

impl Talk<'_> {
    fn flags_of(&self, engine: &dyn Engine) -> u16 {
        let mut flags = tflag::HAS_FLAGS
            | tflag::SEND_FLUSH
            | tflag::SEND_FUA
            | tflag::SEND_TRIM
            | tflag::SEND_WRITE_ZEROES
            | tflag::CAN_MULTI_CONN
            | tflag::SEND_CACHE;
        if self.structured {
            flags |= tflag::SEND_DF;
        }
        if engine.has_fast_zero() {
            flags |= tflag::SEND_FAST_ZERO;
        }
        flags
    }

    fn read<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut raw = [0u8; N];
        self.stream.read_exact(&mut raw)?;
        Ok(raw)
    }

    fn reply(&mut self, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
        let mut out = Vec::with_capacity(20 + data.len());
        out.extend_from_slice(&proto::OPT_REPLY_MAGIC.to_be_bytes());
        out.extend_from_slice(&option.to_be_bytes());
        out.extend_from_slice(&kind.to_be_bytes());
        out.extend_from_slice(&(data.len() as u32).to_be_bytes());
        out.extend_from_slice(data);
        self.stream.write_all(&out)
    }

    fn go(&mut self, option: u32, data: &[u8]) -> io::Result<Option<Agreed>> {
        let Some(name) = proto::parse_info(data) else {
            self.reply(option, rep::ERR_INVALID, b"malformed request for an export")?;
            return Ok(None);
        };
        let Some(engine) = self.exports.find(name) else {
            let text = format!("there is no export `{name}`; see the list");
            self.reply(option, rep::ERR_UNKNOWN, text.as_bytes())?;
            return Ok(None);
        };
        let mut export = info::EXPORT.to_be_bytes().to_vec();
        export.extend_from_slice(&engine.capacity_bytes().to_be_bytes());
        export.extend_from_slice(&self.flags_of(&*engine).to_be_bytes());
        self.reply(option, rep::INFO, &export)?;
        let mut sizes = info::BLOCK_SIZE.to_be_bytes().to_vec();
        for size in [512u32, 4096, proto::MAX_PAYLOAD_BYTES] {
            sizes.extend_from_slice(&size.to_be_bytes());
        }
        self.reply(option, rep::INFO, &sizes)?;
        self.reply(option, rep::ACK, &[])?;
        let block_status = self.context_for.as_deref() == Some(name);
        Ok(Some(Agreed {
            fast_zero: engine.has_fast_zero(),
            engine,
            export: name.into(),
            structured: self.structured,
            block_status,
        }))
    }

    fn meta(&mut self, option: u32, data: &[u8]) -> io::Result<()> {
        let set = option == opt::SET_META_CONTEXT;
        if set {
            self.context_for = None;
        }
        let Some((name, queries)) = proto::parse_meta(data).filter(|_| self.structured) else {
            return self.reply(
                option,
                rep::ERR_INVALID,
                b"malformed, or no structured replies",
            );
        };
        if self.exports.find(name).is_none() {
            return self.reply(option, rep::ERR_UNKNOWN, b"no such export");
        }
        let name = name.to_string();
        let listed = !set && queries.is_empty();
        if listed
            || queries
                .iter()
                .any(|q| *q == proto::CONTEXT_NAME || (!set && *q == "base:"))
        {
            let mut out = proto::CONTEXT_ID.to_be_bytes().to_vec();
            out.extend_from_slice(proto::CONTEXT_NAME.as_bytes());
            self.reply(option, rep::META_CONTEXT, &out)?;
            if set {
                self.context_for = Some(name);
            }
        }
        self.reply(option, rep::ACK, &[])
    }

    /// The old way: no answer but the export's data, or hanging up.
    fn export_name(&mut self, data: &[u8], no_zeroes: bool) -> Result<Agreed, HandshakeError> {
        let found = std::str::from_utf8(data)
            .ok()
            .and_then(|name| self.exports.find(name));
        let Some(engine) = found else {
            let name = String::from_utf8_lossy(data);
            return Err(HandshakeError::Protocol(format!(
                "there is no export `{name}`"
            )));
        };
        let mut out = engine.capacity_bytes().to_be_bytes().to_vec();
        out.extend_from_slice(&self.flags_of(&*engine).to_be_bytes());
        if !no_zeroes {
            out.resize(out.len() + 124, 0);
        }
        self.stream.write_all(&out)?;
        Ok(Agreed {
            fast_zero: engine.has_fast_zero(),
            engine,
            export: String::from_utf8_lossy(data).into_owned(),
            structured: self.structured,
            block_status: false,
        })
    }
}

/// Talks until an export is chosen, at most to the deadline.
pub fn shake(
    stream: &Stream,
    exports: &Exports,
    deadline: Instant,
) -> Result<Agreed, HandshakeError> {
    let timed = stream.until(deadline);
    let agreed = talk(timed, exports)?;
    timed.release()?;
    Ok(agreed)
}

fn talk(stream: Timed<'_>, exports: &Exports) -> Result<Agreed, HandshakeError> {
    let mut talk = Talk {
        stream,
        exports,
        structured: false,
        context_for: None,
    };
    let mut hello = proto::INIT_MAGIC.to_be_bytes().to_vec();
    hello.extend_from_slice(&proto::OPT_MAGIC.to_be_bytes());
    let offered = proto::FLAG_FIXED_NEWSTYLE | proto::FLAG_NO_ZEROES;
    hello.extend_from_slice(&offered.to_be_bytes());
    talk.stream.write_all(&hello)?;
    let flags = u32::from_be_bytes(talk.read()?);
    if flags & !u32::from(offered) != 0 {
        let text = format!("client flags {flags:#x} are not known");
        return Err(HandshakeError::Protocol(text));
    }
    let no_zeroes = flags & u32::from(proto::FLAG_NO_ZEROES) != 0;
    loop {
        let head: [u8; 16] = talk.read()?;
        let parsed = proto::be_u64(&head).and_then(|(magic, rest)| {
            let (option, rest) = proto::be_u32(rest)?;
            Some((magic, option, proto::be_u32(rest)?.0))
        });
        let (magic, option, len) = parsed.unwrap_or_default();
        if magic != proto::OPT_MAGIC {
            let text = format!("option magic is {magic:#x}: not an NBD client");
            return Err(HandshakeError::Protocol(text));
        }
        if len > proto::MAX_OPTION_BYTES {
            let text = format!("option {option} announces {len} bytes");
            talk.reply(option, rep::ERR_TOO_BIG, text.as_bytes())?;
            return Err(HandshakeError::Protocol(text));
        }
        let mut data = vec![0u8; len as usize];
        talk.stream.read_exact(&mut data)?;
        match option {
            opt::EXPORT_NAME => return talk.export_name(&data, no_zeroes),
            opt::ABORT => {
                let _ = talk.reply(option, rep::ACK, &[]);
                return Err(HandshakeError::Aborted);
            }
            opt::LIST => {
                for name in exports.names() {
                    let mut out = (name.len() as u32).to_be_bytes().to_vec();
                    out.extend_from_slice(name.as_bytes());
                    talk.reply(option, rep::SERVER, &out)?;
                }
                talk.reply(option, rep::ACK, &[])?;
            }
            opt::INFO => {
                talk.go(option, &data)?;
            }
            opt::GO => {
                if let Some(agreed) = talk.go(option, &data)? {
                    return Ok(agreed);
                }
            }
            opt::STRUCTURED_REPLY => {
                let kind = if data.is_empty() {
                    rep::ACK
                } else {
                    rep::ERR_INVALID
                };
                talk.structured |= data.is_empty();
                talk.reply(option, kind, &[])?;
            }
            opt::LIST_META_CONTEXT | opt::SET_META_CONTEXT => talk.meta(option, &data)?,
            _ => talk.reply(option, rep::ERR_UNSUP, b"option is not supported")?,
        }
    }
}
