//! Loading the devices of a machine: each from the whole of its state, several at a time where the
//! VMM allows that.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::num::NonZeroUsize;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::vm::{DeviceState, VmError};
use crate::worker::{Role, scoped};

/// More threads than this load no machine faster: what is left waits for the kernel.
const THREADS_MAX: usize = 8;

/// When a device may be loaded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadRule {
    beside: bool,
    after: Vec<Cow<'static, str>>,
}

impl LoadRule {
    /// While no other is: after every device that stands before it, and before every one that
    /// stands behind it.
    pub fn alone() -> LoadRule {
        LoadRule::default()
    }

    /// While others are, on another thread: in any order with those around it, up to the next that
    /// loads [alone](LoadRule::alone).
    pub fn beside_others() -> LoadRule {
        LoadRule { beside: true, after: Vec::new() }
    }

    /// And not before every device of that name has been loaded, wherever they stand. Those that
    /// did not come are not waited for.
    #[must_use]
    pub fn after(mut self, name: impl Into<Cow<'static, str>>) -> LoadRule {
        self.after.push(name.into());
        self
    }
}

/// The threads that load the devices of a machine: the one that calls, and some to help it, called
/// `dest/load-N`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loaders {
    threads: usize,
}

impl Loaders {
    /// As many as this host has processors, within reason.
    pub fn of_this_host() -> Loaders {
        let processors = thread::available_parallelism().map_or(1, NonZeroUsize::get);
        Loaders { threads: processors.min(THREADS_MAX) }
    }

    /// The calling thread alone.
    pub fn one() -> Loaders {
        Loaders { threads: 1 }
    }

    /// Loads each of `devices` with `load`, when `rule` allows it. The first that cannot be loaded
    /// ends it: no other is begun, those under way are waited for, and the error names the device.
    pub fn load(
        self,
        devices: Vec<DeviceState>,
        rule: impl Fn(&DeviceState) -> LoadRule,
        load: impl Fn(DeviceState) -> Result<(), VmError> + Sync,
    ) -> Result<(), VmError> {
        let Plan { waits_for, frees, widest } = Plan::of(&devices, rule);
        let names = devices.iter().map(|device| (device.name.clone(), device.instance_id));
        let work = Work {
            names: names.collect(),
            frees,
            load,
            state: Mutex::new(State {
                left: devices.len(),
                devices: devices.into_iter().map(Some).collect(),
                ready: BTreeSet::new(),
                waits_for,
                running: 0,
                failed: None,
            }),
            changed: Condvar::new(),
        };
        work.begin();
        let helpers = self.threads.min(widest).saturating_sub(1);
        thread::scope(|scope| {
            for number in (1..=helpers).filter_map(|number| u8::try_from(number).ok()) {
                // Without one of them the others do its part.
                let _ = scoped(scope, Role::DestinationLoader(number), || work.run());
            }
            work.run();
        });
        let state = work.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        state.failed.map_or(Ok(()), Err)
    }
}

/// What has to come before what. Beside the devices, by their place, it has a node for each name
/// that others wait for, so that it grows with the number of devices and no faster, whatever a
/// stream brings.
#[derive(Debug, Default)]
struct Plan {
    /// How many nodes each node still waits for.
    waits_for: Vec<usize>,
    /// Which nodes wait for each node.
    frees: Vec<Vec<usize>>,
    /// Most devices that could be loaded at a time.
    widest: usize,
}

impl Plan {
    fn of(devices: &[DeviceState], rule: impl Fn(&DeviceState) -> LoadRule) -> Plan {
        let rules: Vec<LoadRule> = devices.iter().map(rule).collect();
        let mut plan = Plan {
            waits_for: vec![0; devices.len()],
            frees: vec![Vec::new(); devices.len()],
            widest: 0,
        };
        plan.keep_alone_apart(&rules);
        let mut named: HashMap<&str, Vec<usize>> = HashMap::new();
        for (place, device) in devices.iter().enumerate() {
            named.entry(&device.name).or_default().push(place);
        }
        let mut nodes: HashMap<&str, usize> = HashMap::new();
        for (place, name) in rules
            .iter()
            .enumerate()
            .flat_map(|(place, rule)| rule.after.iter().map(move |n| (place, n)))
        {
            let Some(before) = named.get(name.as_ref()) else { continue };
            let node = *nodes.entry(name.as_ref()).or_insert_with(|| {
                let node = plan.waits_for.len();
                plan.waits_for.push(0);
                plan.frees.push(Vec::new());
                before.iter().for_each(|&device| plan.edge(device, node));
                node
            });
            plan.edge(node, place);
        }
        plan
    }

    /// Who loads alone waits for all since the last one that does, and those behind for it.
    fn keep_alone_apart(&mut self, rules: &[LoadRule]) {
        let mut last_alone = None;
        let mut since: Vec<usize> = Vec::new();
        for (place, rule) in rules.iter().enumerate() {
            if let Some(alone) = last_alone {
                self.edge(alone, place);
            }
            if rule.beside {
                since.push(place);
                self.widest = self.widest.max(since.len());
            } else {
                since.drain(..).for_each(|before| self.edge(before, place));
                last_alone = Some(place);
            }
        }
    }

    fn edge(&mut self, from: usize, to: usize) {
        self.frees[from].push(to);
        self.waits_for[to] += 1;
    }
}

/// One machine's devices, being loaded.
struct Work<L> {
    names: Vec<(String, u32)>,
    frees: Vec<Vec<usize>>,
    load: L,
    state: Mutex<State>,
    /// There is more to be loaded, or nothing any more.
    changed: Condvar,
}

struct State {
    devices: Vec<Option<DeviceState>>,
    /// Devices that wait for nothing but a thread, in their order.
    ready: BTreeSet<usize>,
    waits_for: Vec<usize>,
    running: usize,
    left: usize,
    failed: Option<VmError>,
}

impl<L: Fn(DeviceState) -> Result<(), VmError> + Sync> Work<L> {
    fn lock(&self) -> MutexGuard<'_, State> {
        // It is whole after every statement that changes it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds what need not wait.
    fn begin(&self) {
        let mut state = self.lock();
        let free: Vec<usize> =
            (0..state.waits_for.len()).filter(|&node| state.waits_for[node] == 0).collect();
        free.into_iter().for_each(|node| self.freed(&mut state, node));
    }

    /// `node` waits for nothing any more.
    fn freed(&self, state: &mut State, node: usize) {
        match node < self.names.len() {
            true => drop(state.ready.insert(node)),
            // A name, of which every device is loaded.
            false => self.done(state, node),
        }
    }

    fn done(&self, state: &mut State, node: usize) {
        for &next in &self.frees[node] {
            state.waits_for[next] -= 1;
            if state.waits_for[next] == 0 {
                self.freed(state, next);
            }
        }
    }

    /// What each thread does.
    fn run(&self) {
        let mut state = self.lock();
        while state.failed.is_none() && state.left > 0 {
            if let Some(place) = state.ready.pop_first() {
                let device = state.devices[place].take().expect("each is loaded once");
                state.running += 1;
                drop(state);
                let outcome = self.load_one(device);
                state = self.lock();
                state.running -= 1;
                state.left -= 1;
                match outcome {
                    Ok(()) => self.done(&mut state, place),
                    Err(error) => self.fail(&mut state, place, error),
                }
                self.changed.notify_all();
            } else if state.running > 0 {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            } else {
                let place = state.devices.iter().position(Option::is_some).unwrap_or_default();
                let error = VmError::new("it waits for devices that wait for it, in this order");
                self.fail(&mut state, place, error);
            }
        }
    }

    fn load_one(&self, device: DeviceState) -> Result<(), VmError> {
        /// A panic must not leave the other threads waiting.
        struct Panicked<'w, L>(&'w Work<L>);
        impl<L> Drop for Panicked<'_, L> {
            fn drop(&mut self) {
                if thread::panicking() {
                    let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
                    state.failed.get_or_insert(VmError::new("loading a device panicked"));
                    self.0.changed.notify_all();
                }
            }
        }
        let _told = Panicked(self);
        (self.load)(device)
    }

    fn fail(&self, state: &mut State, place: usize, error: VmError) {
        let (name, instance_id) = &self.names[place];
        state.failed.get_or_insert_with(|| VmError::of_device(name, *instance_id, error));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::time::{Duration, Instant};

    use super::*;

    const FOUR: Loaders = Loaders { threads: 4 };

    fn devices(names: &[&str]) -> Vec<DeviceState> {
        let device = |(name, instance_id): (&&str, u32)| DeviceState {
            name: (*name).to_owned(),
            instance_id,
            version_id: 1,
            bytes: Vec::new(),
        };
        names.iter().zip(0..).map(device).collect()
    }

    /// `a` loads alone, `b` beside others, `c` beside others after every `b`, `d` after `c`.
    fn rule(device: &DeviceState) -> LoadRule {
        match device.name.as_str() {
            "b" => LoadRule::beside_others(),
            "c" => LoadRule::beside_others().after("b").after("none such"),
            "d" => LoadRule::beside_others().after("c"),
            _ => LoadRule::alone(),
        }
    }

    /// Loads them; gives when each began and when it ended, by its place.
    fn load(loaders: Loaders, names: &[&str]) -> Vec<(Instant, Instant)> {
        let times = Mutex::new(vec![None; names.len()]);
        let outcome = loaders.load(devices(names), rule, |device| {
            let began = Instant::now();
            thread::sleep(Duration::from_millis(3));
            times.lock().unwrap()[device.instance_id as usize] = Some((began, Instant::now()));
            Ok(())
        });
        outcome.unwrap();
        times.into_inner().unwrap().into_iter().map(|time| time.expect("each is loaded")).collect()
    }

    #[test]
    fn without_a_word_they_load_one_by_one_in_their_order() {
        for loaders in [Loaders::one(), FOUR] {
            let times = load(loaders, &["a", "x", "a", "y"]);
            assert!(times.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{times:?}");
        }
    }

    #[test]
    fn one_that_loads_alone_parts_those_around_it() {
        let times = load(FOUR, &["b", "b", "a", "b", "c"]);
        let alone = times[2];
        assert!(times[..2].iter().all(|other| other.1 <= alone.0), "{times:?}");
        assert!(times[3..].iter().all(|other| other.0 >= alone.1), "{times:?}");
    }

    #[test]
    fn whoever_waits_for_a_name_waits_for_all_of_that_name_wherever_they_stand() {
        for loaders in [Loaders::one(), FOUR] {
            let times = load(loaders, &["d", "c", "b", "c", "b"]);
            let last_b = times[2].1.max(times[4].1);
            assert!(times[1].0 >= last_b && times[3].0 >= last_b, "{times:?}");
            assert!(times[0].0 >= times[1].1.max(times[3].1), "{times:?}");
        }
    }

    #[test]
    fn those_that_may_load_at_the_same_time_do() {
        // Each waits for the other three: alone none would ever end.
        let all = Barrier::new(4);
        let threads = Mutex::new(BTreeSet::new());
        let outcome = FOUR.load(devices(&["b", "b", "b", "b"]), rule, |_| {
            let thread = thread::current().name().unwrap_or_default().to_owned();
            threads.lock().unwrap().insert(thread);
            all.wait();
            Ok(())
        });
        outcome.unwrap();
        let threads = threads.into_inner().unwrap();
        let helpers: Vec<&String> =
            threads.iter().filter(|n| n.starts_with("dest/load-")).collect();
        assert_eq!(helpers, ["dest/load-1", "dest/load-2", "dest/load-3"]);
        assert_eq!(threads.len(), 4, "and the one that called: {threads:?}");
    }

    #[test]
    fn the_first_error_is_told_with_its_device_and_no_other_is_begun() {
        for loaders in [Loaders::one(), FOUR] {
            let begun = Mutex::new(Vec::new());
            let outcome = loaders.load(devices(&["b", "a", "a", "b"]), rule, |device| {
                begun.lock().unwrap().push(device.instance_id);
                match device.instance_id {
                    1 => Err(VmError::new("of no use")),
                    _ => Ok(()),
                }
            });
            let error = outcome.unwrap_err();
            assert_eq!(error.to_string(), "device a/1: of no use");
            assert_eq!(begun.into_inner().unwrap(), [0, 1]);
        }
    }

    #[test]
    fn those_that_wait_for_each_other_are_refused() {
        let circle = |device: &DeviceState| match device.name.as_str() {
            "b" => LoadRule::beside_others().after("c"),
            "itself" => LoadRule::beside_others().after("itself"),
            _ => rule(device),
        };
        for names in [&["a", "b", "c"][..], &["itself"], &["c", "a", "b"]] {
            for loaders in [Loaders::one(), FOUR] {
                let error = loaders.load(devices(names), circle, |_| Ok(())).unwrap_err();
                assert!(error.to_string().contains("waits for devices that wait"), "{error}");
            }
        }
        // One that loads alone, after what stands behind it.
        let behind = |device: &DeviceState| match device.name.as_str() {
            "a" => LoadRule::alone().after("b"),
            _ => rule(device),
        };
        let error = FOUR.load(devices(&["a", "b"]), behind, |_| Ok(())).unwrap_err();
        assert!(error.to_string().starts_with("device a/0: it waits"), "{error}");
        FOUR.load(devices(&["b", "a"]), behind, |_| Ok(())).unwrap();
    }

    #[test]
    fn as_many_as_a_stream_can_bring_take_no_longer_each() {
        let names: Vec<&str> = (0..1 << 16)
            .map(|n| ["b", "c", "a", "d"][if n < 1 << 15 { n % 2 } else { 2 + n % 2 }])
            .collect();
        let began = Instant::now();
        let loaded = Mutex::new(0);
        let outcome = FOUR.load(devices(&names), rule, |_| {
            *loaded.lock().unwrap() += 1;
            Ok(())
        });
        outcome.unwrap();
        assert_eq!(loaded.into_inner().unwrap(), names.len());
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    }

    #[test]
    fn a_panic_leaves_nobody_waiting() {
        let outcome = std::panic::catch_unwind(|| {
            FOUR.load(devices(&["b", "b", "c"]), rule, |device| match device.instance_id {
                0 => panic!("a bug of the VMM's, as this test wants it"),
                _ => Ok(()),
            })
        });
        assert!(outcome.is_err());
    }

    #[test]
    fn nothing_is_loaded_at_once() {
        FOUR.load(Vec::new(), rule, |_| Err(VmError::new("never called"))).unwrap();
    }
}
