//! How a part gets, renews and follows its certificate: the management server's client.
//!
//! [`request`] makes a key and the request for its certificate, [`http`] carries it to the server,
//! [`steps`] are enrolment, renewal and what is fetched with a certificate; [`agent`] takes them when
//! they are due. The program of an operator and the daemons of hosts and appliances use the same.
//!
//! Invariant: a key is made where it is used and never leaves that machine; nothing is written before
//! it was checked to be what was asked for; the server is believed only by the authority's certificate
//! that was there first.

pub mod agent;
pub mod command;
pub mod http;
pub mod request;
pub mod steps;

pub use agent::Agent;
pub use http::{HttpError, Server};
pub use steps::{EnrolError, Identified};
