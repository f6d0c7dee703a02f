//! Positions of one disk's stream, each its own type.
//!
//! Invariant, at any moment, for one disk: `published >= sent >= received >= durable >= uploaded`.
//! The types cannot be compared or assigned across by accident; a position moves to the next stage
//! only by the named conversions below, which say what made it true.

/// The highest sequence number that can be used: one below the top, so `seq + 1` never overflows.
pub const MAX_SEQ: u64 = u64::MAX - 1;

macro_rules! position {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// No record yet: sequence numbers start at 1.
            pub const NONE: Self = Self(0);

            /// The sequence number, or 0 for "none yet".
            pub const fn seq(self) -> u64 {
                self.0
            }

            /// Moves forward to `to`; a position never moves backwards. Returns whether it moved.
            pub fn advance(&mut self, to: Self) -> bool {
                let moved = to > *self;
                if moved {
                    *self = to;
                }
                moved
            }
        }
    };
}

position!(
    /// The last record that the filter published into the lane.
    Published
);
position!(
    /// The last record that the daemon handed to the transport.
    Sent
);
position!(
    /// The last record that the DR appliance has received, checked and queued for its log.
    Received
);
position!(
    /// The last record that the DR appliance's log holds durably; the lane frees space up to here.
    Durable
);
position!(
    /// The last record that the object store holds.
    Uploaded
);

impl Durable {
    /// What is durable was received: the position one stage earlier is at least this.
    pub const fn as_received(self) -> Received {
        Received(self.0)
    }
}

impl Uploaded {
    /// What is uploaded was durable: the position one stage earlier is at least this.
    pub const fn as_durable(self) -> Durable {
        Durable(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_never_moves_backwards() {
        let mut durable = Durable(7);
        assert!(!durable.advance(Durable(7)));
        assert!(!durable.advance(Durable(3)));
        assert_eq!(durable, Durable(7));
        assert!(durable.advance(Durable(8)));
        assert_eq!(durable.seq(), 8);
    }
}
