//! A Network Block Device server and client: fixed newstyle, structured replies.
//!
//! | file | holds |
//! |---|---|
//! | [`proto`] | numbers of the protocol, and parsers of a peer's bytes |
//! | [`engine`] | what serves requests: inline or later, from any thread |
//! | [`handshake`] | options, up to transmission |
//! | [`server`] | listeners and connections |
//! | [`client`] | a small client |
//!
//! Invariant: a length from the peer is checked against its limit before anything is read or
//! reserved for it; whatever a client does, it harms only its own connection.

pub mod client;
pub mod engine;
pub mod handshake;
pub mod proto;
pub mod server;
pub mod stream;
