//! The network between a daemon and its appliance, as a thing that can break: a TCP proxy for all of an
//! appliance's ports.
//!
//! Invariant: bytes go through unchanged and in order, or not at all; a cut ends every connection.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpStream};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How the network is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Weather {
    /// Everything goes through.
    Fine,
    /// Connections stay, and nothing comes through: half-open.
    Stalled,
    /// Connections are refused.
    Cut,
}

struct Shared {
    weather: AtomicU8,
    open: Mutex<Vec<TcpStream>>,
}

impl Shared {
    fn is(&self, weather: Weather) -> bool {
        self.weather.load(Ordering::Acquire) == weather as u8 // pairs with `set`
    }

    /// Copies one direction until it ends or the network is cut.
    fn copy(&self, mut from: TcpStream, mut to: TcpStream) {
        let mut bytes = vec![0; 64 << 10];
        while let Ok(read @ 1..) = from.read(&mut bytes) {
            while self.is(Weather::Stalled) {
                std::thread::sleep(Duration::from_millis(2)); // poll
            }
            if self.is(Weather::Cut) || to.write_all(&bytes[..read]).is_err() {
                break;
            }
        }
        let _ = from.shutdown(Shutdown::Both);
        let _ = to.shutdown(Shutdown::Both);
    }
}

/// A proxy; its threads end with the process.
pub struct Link {
    shared: Arc<Shared>,
    /// The first of its ports.
    pub port_base: u64,
}

impl Link {
    /// Listens before an appliance.
    pub fn before(appliance_port_base: u64) -> Self {
        let (base, listeners) = drva::appliance::bind(Ipv4Addr::LOCALHOST.into(), 0).unwrap();
        let shared = Arc::new(Shared {
            weather: AtomicU8::new(Weather::Fine as u8),
            open: Mutex::default(),
        });
        for (role, listener) in listeners {
            let shared = shared.clone();
            let port = appliance_port_base as u16 + role.offset();
            std::thread::spawn(move || {
                for near in listener.incoming().flatten() {
                    let far = TcpStream::connect((Ipv4Addr::LOCALHOST, port));
                    let (false, Ok(far)) = (shared.is(Weather::Cut), far) else {
                        continue;
                    };
                    let _ = (near.set_nodelay(true), far.set_nodelay(true));
                    let ends = [&near, &far].map(|end| end.try_clone().unwrap());
                    shared.open.lock().unwrap().extend(ends);
                    let ends = (near.try_clone().unwrap(), far.try_clone().unwrap());
                    let (there, back) = (shared.clone(), shared.clone());
                    std::thread::spawn(move || there.copy(near, far));
                    std::thread::spawn(move || back.copy(ends.1, ends.0));
                }
            });
        }
        Self {
            shared,
            port_base: base.into(),
        }
    }

    /// Changes the weather. A cut ends what is open.
    pub fn set(&self, weather: Weather) {
        // pairs with `is`
        self.shared.weather.store(weather as u8, Ordering::Release);
        if weather == Weather::Cut {
            for end in self.shared.open.lock().unwrap().drain(..) {
                let _ = end.shutdown(Shutdown::Both);
            }
        }
    }
}
