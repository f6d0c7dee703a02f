//! The host daemon: drains lanes and streams them to the DR appliance.
