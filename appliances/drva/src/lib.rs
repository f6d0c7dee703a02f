//! The DR appliance: sessions, replication log, cuts, upload.
