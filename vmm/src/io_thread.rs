//! The I/O thread: carries notifications and host events to the virtio devices.
//!
//! In: what drivers notify, by ioeventfd; what the host has for a device. Out: calls to the device's transport, under its
//! lock. Holds: a parked thread touches no device, so that whoever parked it sees them standing still; what comes
//! meanwhile waits in its descriptor.

use devices::lock;
use devices::virtio::Transport;
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use vmm_sys_util::eventfd::EventFd;

/// A transport, and the events that its driver's notifications arrive on: one for each queue.
pub struct Window {
    /// The transport.
    pub transport: Arc<Mutex<dyn Transport + Send>>,
    /// Its queues' events.
    pub queues: Vec<EventFd>,
}

impl Window {
    /// What the device has left for its next turn is notified again, behind what waits by now.
    fn work(&self, act: impl FnOnce(&mut dyn Transport)) {
        let mut transport = lock(&self.transport);
        act(&mut *transport);
        let unfinished = transport.unfinished();
        drop(transport);
        for (queue, event) in self.queues.iter().enumerate() {
            if unfinished & 1 << queue != 0 {
                // It fails only when 2^64 - 2 notifications wait already.
                let _ = event.write(1);
            }
        }
    }
}

/// The thread, parked or serving.
pub struct IoThread {
    park: Arc<AtomicBool>,
    wake: Arc<EventFd>,
    serve: Option<Sender<()>>,
    parked: Receiver<()>,
    serving: bool,
    thread: Option<JoinHandle<()>>,
}

/// Marks an event as the host's rather than a queue's.
const HOST: u32 = u32::MAX;

impl IoThread {
    /// Starts a parked thread for the windows.
    ///
    /// # Errors
    /// The host has no thread or descriptor to give.
    pub fn new(windows: Vec<Window>) -> io::Result<Self> {
        let park = Arc::new(AtomicBool::new(false));
        let wake = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        let mut manager = EventManager::new().map_err(io::Error::other)?;
        manager.add_subscriber(Subscriber::Wake(wake.clone()));
        for window in windows {
            manager.add_subscriber(Subscriber::Window(window));
        }
        let (serve, orders) = channel();
        let (report, parked) = channel();
        let asked = park.clone();
        let body = move || live(&mut manager, &orders, &asked, &report);
        let thread = std::thread::Builder::new().name("io".to_owned()).spawn(body)?;
        Ok(Self { park, wake, serve: Some(serve), parked, serving: false, thread: Some(thread) })
    }

    /// Lets it serve.
    pub fn serve(&mut self) {
        self.park.store(false, Ordering::SeqCst);
        if let (false, Some(serve)) = (self.serving, &self.serve) {
            self.serving = serve.send(()).is_ok();
        }
    }

    /// Parks it; it touches no device when this returns.
    pub fn park(&mut self) {
        if !std::mem::take(&mut self.serving) {
            return;
        }
        self.park.store(true, Ordering::SeqCst);
        // It fails only when 2^64 - 2 wakes wait already.
        let _ = self.wake.write(1);
        // It fails when the thread panicked, which touches no device either.
        let _ = self.parked.recv();
    }
}

/// The thread ends with its handle.
impl Drop for IoThread {
    fn drop(&mut self) {
        self.park();
        self.serve = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn live(
    manager: &mut EventManager<Subscriber>,
    orders: &Receiver<()>,
    park: &AtomicBool,
    report: &Sender<()>,
) {
    while orders.recv().is_ok() {
        while !park.load(Ordering::SeqCst) {
            // An interrupted wait is begun again.
            let _ = manager.run();
        }
        if report.send(()).is_err() {
            return;
        }
    }
}

enum Subscriber {
    Wake(Arc<EventFd>),
    Window(Window),
}

impl MutEventSubscriber for Subscriber {
    fn init(&mut self, ops: &mut EventOps) {
        // Adding fails only for a descriptor that is there twice, or when the host is out of memory for it: then the
        // device stands still, which its driver reports.
        let mut add = |events| drop(ops.add(events));
        match self {
            Self::Wake(wake) => add(Events::new(&**wake, EventSet::IN)),
            Self::Window(window) => {
                for (index, event) in (0..).zip(&window.queues) {
                    add(Events::with_data(event, index, EventSet::IN));
                }
                if let Some(fd) = lock(&window.transport).host_fd() {
                    let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
                    add(Events::with_data_raw(fd.as_raw_fd(), HOST, edge));
                }
            }
        }
    }

    fn process(&mut self, events: Events, _: &mut EventOps) {
        match self {
            Self::Wake(wake) => drop(wake.read()),
            Self::Window(window) if events.data() == HOST => window.work(|device| device.host_ready()),
            Self::Window(window) => {
                if let Some(event) = window.queues.get(events.data() as usize) {
                    let _ = event.read();
                    window.work(|device| device.notified(events.data() as usize));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use devices::virtio::Broken;
    use devices::{BusDevice, Request};
    use std::os::fd::BorrowedFd;
    use std::time::{Duration, Instant};

    /// How often it was notified, and how often it has to be again.
    struct Counter(usize, usize);

    impl BusDevice for Counter {
        fn read(&mut self, _: u64, _: &mut [u8]) {}
        fn write(&mut self, _: u64, _: &[u8]) -> Option<Request> {
            None
        }
    }

    impl Transport for Counter {
        fn queues(&self) -> usize {
            1
        }
        fn notified(&mut self, _: usize) {
            self.0 += 1;
            self.1 = self.1.saturating_sub(1);
        }
        fn host_fd(&self) -> Option<BorrowedFd<'_>> {
            None
        }
        fn host_ready(&mut self) {}
        fn unfinished(&mut self) -> u64 {
            u64::from(self.1 > 0)
        }
        fn drain(&mut self, _: Instant) {}
        fn start(&mut self) {}
        fn broken(&self) -> Option<&Broken> {
            None
        }
    }

    fn wait_for(counter: &Mutex<Counter>, count: usize) {
        let started = Instant::now();
        while lock(counter).0 != count {
            assert!(started.elapsed() < Duration::from_secs(10), "never notified");
            std::thread::yield_now();
        }
    }

    #[test]
    fn what_a_device_left_is_notified_again() {
        let counter = Arc::new(Mutex::new(Counter(0, 5)));
        let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let window = Window { transport: counter.clone(), queues: vec![event.try_clone().unwrap()] };
        let mut io = IoThread::new(vec![window]).unwrap();
        event.write(1).unwrap();
        io.serve();
        wait_for(&counter, 5);
        io.park();
        assert_eq!(lock(&counter).0, 5);
    }

    #[test]
    fn a_parked_thread_touches_nothing_and_loses_nothing() {
        let counter = Arc::new(Mutex::new(Counter(0, 0)));
        let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let window = Window { transport: counter.clone(), queues: vec![event.try_clone().unwrap()] };
        let mut io = IoThread::new(vec![window]).unwrap();
        event.write(1).unwrap();
        io.serve();
        wait_for(&counter, 1);
        io.park();
        event.write(1).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(lock(&counter).0, 1);
        io.serve();
        wait_for(&counter, 2);
    }
}
