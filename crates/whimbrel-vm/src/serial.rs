//! The serial port: a 16550 at I/O port 0x3f8, polled (its interrupt is not wired up).

use std::collections::VecDeque;
use std::convert::Infallible;
use std::fmt;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};

use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};
use whimbrel::{DeviceState, VmError};

use crate::config::SerialOutput;
use crate::error::Error;
use crate::state::{Fields, Tag, Writer};

/// The port's device state.
pub(crate) const DEVICE: &str = "serial";
/// The first of its eight I/O ports.
pub(crate) const PORT: u16 = 0x3f8;
/// How much output is kept for reading: the latest.
const KEPT: usize = 64 << 10;

const REGISTERS: Tag = Tag(1, "registers");
const INPUT: Tag = Tag(2, "input");

/// The interrupt line, which leads nowhere.
#[derive(Clone, Copy, Debug)]
struct NoInterrupt;

impl Trigger for NoInterrupt {
    type E = Infallible;
    fn trigger(&self) -> Result<(), Infallible> {
        Ok(())
    }
}

/// What the guest has written.
#[derive(Default)]
struct Output {
    kept: VecDeque<u8>,
    copy: Option<Box<dyn Write + Send>>,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.kept.extend(bytes);
        let above = self.kept.len().saturating_sub(KEPT);
        self.kept.drain(..above);
        if let Some(copy) = &mut self.copy {
            copy.write_all(bytes)?;
            // A line at a time, so that it is seen while the guest runs.
            if bytes.contains(&b'\n') {
                copy.flush()?;
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The serial port.
pub(crate) struct SerialPort {
    serial: Mutex<Serial<NoInterrupt, NoEvents, Output>>,
}

impl SerialPort {
    pub(crate) fn new(to: &SerialOutput) -> Result<SerialPort, Error> {
        let copy: Option<Box<dyn Write + Send>> = match to {
            SerialOutput::Buffer => None,
            SerialOutput::Stdout => Some(Box::new(io::stdout())),
            SerialOutput::Stderr => Some(Box::new(io::stderr())),
            SerialOutput::File(path) => {
                let file = OpenOptions::new().append(true).create(true).open(path);
                let error = |source| Error::Serial { path: path.clone(), source };
                Some(Box::new(file.map_err(error)?))
            }
        };
        let output = Output { kept: VecDeque::new(), copy };
        Ok(SerialPort { serial: Mutex::new(Serial::new(NoInterrupt, output)) })
    }

    fn lock(&self) -> MutexGuard<'_, Serial<NoInterrupt, NoEvents, Output>> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest writes a register. An output that takes no more loses the byte, as a cable
    /// would that nobody holds the other end of.
    pub(crate) fn write(&self, register: u8, value: u8) {
        let _lost = self.lock().write(register, value);
    }

    /// The guest reads a register.
    pub(crate) fn read(&self, register: u8) -> u8 {
        self.lock().read(register)
    }

    /// Prints a line, as a driver would.
    pub(crate) fn print(&self, line: &str) {
        let mut serial = self.lock();
        for byte in line.bytes().chain([b'\n']) {
            let _lost = serial.write(0, byte);
        }
    }

    /// The latest output.
    pub(crate) fn text(&self) -> String {
        let mut serial = self.lock();
        String::from_utf8_lossy(serial.writer_mut().kept.make_contiguous()).into_owned()
    }

    pub(crate) fn save(&self) -> DeviceState {
        let state = self.lock().state();
        let mut writer = Writer::new();
        writer.bytes(
            REGISTERS,
            &[
                state.baud_divisor_low,
                state.baud_divisor_high,
                state.interrupt_enable,
                state.interrupt_identification,
                state.line_control,
                state.line_status,
                state.modem_control,
                state.modem_status,
                state.scratch,
            ],
        );
        writer.bytes(INPUT, &state.in_buffer);
        writer.device(DEVICE, 0)
    }

    /// Reads a state without taking it.
    pub(crate) fn parse(device: &DeviceState) -> Result<SerialState, VmError> {
        let fields = Fields::read(device, &[REGISTERS, INPUT])?;
        let [
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
        ] = fields.array(REGISTERS)?;
        let state = SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer: fields.bytes(INPUT)?.to_vec(),
        };
        Serial::from_state(&state, NoInterrupt, NoEvents, io::sink())
            .map_err(|error| VmError::new(format!("input: {error}")))?;
        Ok(state)
    }

    /// Takes a state that was read by [`parse`](SerialPort::parse).
    pub(crate) fn set(&self, state: &SerialState) {
        let mut serial = self.lock();
        let output = std::mem::take(serial.writer_mut());
        *serial = Serial::from_state(state, NoInterrupt, NoEvents, output)
            .expect("the state was tried when it was read");
    }
}

impl fmt::Debug for SerialPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SerialPort").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_survives_and_output_stays() {
        let port = SerialPort::new(&SerialOutput::Buffer).unwrap();
        port.print("before");
        port.write(7, 0x5a);
        port.write(3, 0x83);
        port.write(0, 12);
        port.write(3, 0x03);
        let other = SerialPort::new(&SerialOutput::Buffer).unwrap();
        other.print("mine");
        other.set(&SerialPort::parse(&port.save()).unwrap());
        assert_eq!(other.read(7), 0x5a);
        assert_eq!(other.save(), port.save());
        other.print("after");
        assert_eq!(other.text(), "mine\nafter\n");
    }

    #[test]
    fn a_file_gets_what_the_buffer_gets() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("serial.log");
        for line in ["one", "two"] {
            let port = SerialPort::new(&SerialOutput::File(path.clone())).unwrap();
            port.print(line);
            assert_eq!(port.text(), format!("{line}\n"));
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "one\ntwo\n");
        let nowhere = SerialOutput::File(folder.path().join("none/serial.log"));
        let error = SerialPort::new(&nowhere).unwrap_err().to_string();
        assert!(error.ends_with("serial.log: No such file or directory (os error 2)"), "{error}");
    }

    #[test]
    fn only_the_latest_output_is_kept() {
        let port = SerialPort::new(&SerialOutput::Buffer).unwrap();
        for number in 0..20_000 {
            port.print(&number.to_string());
        }
        let text = port.text();
        assert_eq!(text.len(), KEPT);
        assert!(text.ends_with("19998\n19999\n"));
    }

    #[test]
    fn an_overfull_input_is_refused() {
        let mut writer = Writer::new();
        writer.bytes(REGISTERS, &[0; 9]);
        writer.bytes(INPUT, &[0; 65]);
        assert!(SerialPort::parse(&writer.device(DEVICE, 0)).is_err());
    }
}
