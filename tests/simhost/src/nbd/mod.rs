//! A Network Block Device server and client: fixed newstyle, structured replies.
//!
//! | file | holds |
//! |---|---|
//! | [`proto`] | numbers of the protocol, and parsers of a peer's bytes |
//! | [`engine`] | what serves requests: inline or later, from any thread |
//! | [`handshake`] | options, up to transmission |
//! | [`server`] | listeners, and the life of connections |
//! | [`handover`] | connections that go to another process |
//! | [`connection`] | what is under way of one client, and the way of its replies |
//! | [`transmit`] | requests: read, checked, handed to the engine |
//! | [`budget`] | how much clients may take |
//! | [`stream`] | their sockets |
//! | [`client`] | a small client |
//!
//! Invariant: a length from the peer is checked against its limit before anything is read or
//! reserved for it; whatever a client does, it harms only its own connection.

pub mod budget;
pub mod client;
pub mod connection;
pub mod engine;
pub mod handover;
pub mod handshake;
pub mod proto;
pub mod server;
pub mod stream;
pub mod transmit;
