//! The recovery appliance: turns a cut of a container back into disks.
