//! What commands have in common that take something in: where they wait, whom they let in, and that a
//! signal ends the wait.

use whimbrel::kept::Receiver;
use whimbrel::{Address, SocketAddressInfo};

use crate::failure::Failure;
use crate::signals::OnSignal;
use crate::tls_options::TlsOfDestination;

/// Secures a receiver that waits for `whom` at `uri`, and says where it waits. A signal stops it until
/// the second value is dropped.
pub(crate) fn announced(
    receiver: Receiver,
    tls: &TlsOfDestination,
    uri: &Address,
    whom: &str,
) -> Result<(Receiver, OnSignal), Failure> {
    let receiver = tls.secure(receiver)?.telling_refusals(|reason| {
        eprintln!("whimbrel: a connection was refused, still waiting: {reason}");
    });
    let stop = receiver.stopper();
    let signals = OnSignal::call(move || stop.stop())?;
    match receiver.socket_address() {
        Some(SocketAddressInfo::Inet { host, port }) => {
            eprintln!("waiting for {whom} at tcp:{host}:{port}");
        }
        Some(_) => eprintln!("waiting for {whom} at {uri}"),
        None => {}
    }
    tls.warn(receiver.socket_address().as_ref());
    Ok((receiver, signals))
}
