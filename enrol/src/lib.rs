//! How a part gets, renews and follows its certificate: the management server's client.
//!
//! [`request`] makes a key and the request for its certificate, [`http`] carries it to the server,
//! [`steps`] are enrolment, renewal and the revocation list, [`documents`] what else a part asks for;
//! [`agent`] takes them when they are due, [`follow`] follows the files that come of it, and [`invitation`]
//! is how a host without a certificate learns where to get one. The program of an operator and the daemons of hosts and appliances use the same.
//!
//! Invariant: a key is made where it is used and never leaves that machine; nothing is written before
//! it was checked to be what was asked for; the server is believed only by the authority's certificate
//! that was there first.

pub mod agent;
pub mod command;
pub mod documents;
pub mod follow;
pub mod http;
pub mod invitation;
pub mod request;
pub mod steps;

pub use agent::Agent;
pub use follow::Follower;
pub use http::{HttpError, Server};
pub use invitation::{Invitation, Invitations};
pub use steps::{EnrolError, Identified};
