//! Timers, work, and the filter's own I/O: the host's threads.
//!
//! Invariant: a task runs at most once; after a cancel has returned it is not running and will not;
//! `work_flush` returns only when the disk's earlier work has run.

use crate::contract::ledger::{Kind, Ledger};
use parking_lot::{Condvar, Mutex};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle, ThreadId};
use std::time::{Duration, Instant};

/// A callback of the filter.
pub type TaskFn = unsafe extern "C" fn(*mut c_void);

/// A callback with its userdata, and the account that it is on.
pub struct Task {
    /// The filter's function.
    pub function: TaskFn,
    /// Its argument.
    pub userdata: *mut c_void,
    /// The disk's account.
    pub ledger: Arc<Ledger>,
}

// SAFETY: the contract: tasks are run on any thread of the host.
unsafe impl Send for Task {}

impl Task {
    fn run(self, kind: Kind) {
        // SAFETY: the filter's function with the filter's userdata, called once, as the contract
        // says.
        self.ledger
            .run(kind, || unsafe { (self.function)(self.userdata) });
    }
}

/// Most timers of a process.
const MAX_TIMERS: usize = 65536;
/// Most items of work that may wait.
const MAX_WORK: usize = 4096;

#[derive(Default)]
struct Timers {
    queue: BinaryHeap<Reverse<(Instant, u64)>>,
    tasks: HashMap<u64, Task>,
    running: Option<u64>,
    next: u64,
    thread: Option<ThreadId>,
}

struct Shared {
    timers: Mutex<Timers>,
    timer_changed: Condvar,
    work: Mutex<HashMap<usize, usize>>,
    work_done: Condvar,
    stopping: AtomicBool,
}

type Job = Box<dyn FnOnce() + Send>;

/// The host's threads.
pub struct Tasks {
    shared: Arc<Shared>,
    work: crossbeam::channel::Sender<(usize, Task)>,
    io: crossbeam::channel::Sender<Job>,
    _threads: Vec<JoinHandle<()>>,
}

/// Threads for work, and threads for I/O that does not run on a client's thread.
const WORKERS: usize = 2;

impl Tasks {
    /// Starts them.
    pub fn start() -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            timers: Mutex::default(),
            timer_changed: Condvar::new(),
            work: Mutex::default(),
            work_done: Condvar::new(),
            stopping: AtomicBool::new(false),
        });
        let mut threads = Vec::new();
        let of = shared.clone();
        threads.push(
            thread::Builder::new()
                .name("timer".into())
                .spawn(move || timer_loop(&of))?,
        );
        let (work, take) = crossbeam::channel::bounded::<(usize, Task)>(MAX_WORK);
        for _ in 0..WORKERS {
            let (of, take) = (shared.clone(), take.clone());
            let run = move || {
                for (owner, task) in take {
                    task.run(Kind::Work);
                    let mut counts = of.work.lock();
                    if let Some(count) = counts.get_mut(&owner) {
                        *count -= 1;
                    }
                    of.work_done.notify_all();
                }
            };
            threads.push(thread::Builder::new().name("work".into()).spawn(run)?);
        }
        let (io, take) = crossbeam::channel::unbounded::<Job>();
        for _ in 0..WORKERS {
            let take = take.clone();
            let run = move || take.into_iter().for_each(|job| job());
            threads.push(thread::Builder::new().name("io".into()).spawn(run)?);
        }
        Ok(Self {
            shared,
            work,
            io,
            _threads: threads,
        })
    }

    /// Runs I/O on a thread of the host. The number of jobs is bounded by the I/Os under way.
    pub fn run_io(&self, job: Job) {
        let _ = self.io.send(job);
    }

    /// Starts a timer; writes its number through `number` before the task can run.
    pub fn timer_start(&self, delay: Duration, task: Task, number: impl FnOnce(u64)) -> bool {
        let mut timers = self.shared.timers.lock();
        if timers.tasks.len() >= MAX_TIMERS {
            return false;
        }
        timers.next += 1;
        let id = timers.next;
        number(id);
        task.ledger.taken(Kind::Timer);
        timers.tasks.insert(id, task);
        timers.queue.push(Reverse((Instant::now() + delay, id)));
        self.shared.timer_changed.notify_all();
        true
    }

    /// Cancels a timer. `true`: it will never run. Otherwise it has run, and is not running now
    /// (unless this is called by it).
    pub fn timer_cancel(&self, id: u64) -> bool {
        let mut timers = self.shared.timers.lock();
        if let Some(task) = timers.tasks.remove(&id) {
            task.ledger.given_back(Kind::Timer);
            return true;
        }
        let own = timers.thread == Some(thread::current().id());
        while !own && timers.running == Some(id) {
            self.shared.timer_changed.wait(&mut timers);
        }
        false
    }

    /// Queues work of `owner`; `false`: the queue is full.
    pub fn work_submit(&self, owner: usize, task: Task) -> bool {
        let ledger = task.ledger.clone();
        ledger.taken(Kind::Work);
        *self.shared.work.lock().entry(owner).or_default() += 1;
        let sent = self.work.try_send((owner, task)).is_ok();
        if !sent {
            ledger.given_back(Kind::Work);
            if let Some(count) = self.shared.work.lock().get_mut(&owner) {
                *count -= 1;
            }
        }
        sent
    }

    /// Waits until the work of `owner` has run.
    pub fn work_flush(&self, owner: usize) {
        let mut counts = self.shared.work.lock();
        while counts.get(&owner).is_some_and(|count| *count > 0) {
            self.shared.work_done.wait(&mut counts);
        }
        counts.remove(&owner);
    }
}

impl Drop for Tasks {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Release); // pairs with the loop's look
        self.shared.timer_changed.notify_all();
    }
}

fn timer_loop(shared: &Shared) {
    let mut timers = shared.timers.lock();
    timers.thread = Some(thread::current().id());
    while !shared.stopping.load(Ordering::Acquire) {
        let Some(&Reverse((due, id))) = timers.queue.peek() else {
            shared.timer_changed.wait(&mut timers);
            continue;
        };
        if Instant::now() < due {
            shared.timer_changed.wait_until(&mut timers, due);
            continue;
        }
        timers.queue.pop();
        if let Some(task) = timers.tasks.remove(&id) {
            timers.running = Some(id);
            drop(timers);
            task.run(Kind::Timer);
            timers = shared.timers.lock();
            timers.running = None;
            shared.timer_changed.notify_all();
        }
    }
}
