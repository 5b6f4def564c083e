//! A client in the kernel's TCP, on a bridge with TAP devices, talks to a guest whose host dies.

use std::fs;
use std::path::Path;

use serde_json::json;

use crate::broken_link::ip;
use crate::process::{Running, SMALL, VmProcess, folder, until};

/// A network of its own, with a bridge at which VMs are plugged in.
struct Bridge {
    name: String,
}

impl Bridge {
    /// `None`, with a line that says why, where no namespaces are to be had, or no TAP devices.
    fn build() -> Option<Bridge> {
        let name = format!("whimbrel-{}-bridge", std::process::id());
        let made = match Path::new("/dev/net/tun").exists() {
            true => ip(&format!("netns add {name}")),
            false => Err("no /dev/net/tun".into()),
        };
        if let Err(why) = made {
            eprintln!("not run with TAP devices: {why}");
            return None;
        }
        let bridge = Bridge { name };
        bridge.ip("link set lo up");
        bridge.ip("link add guests type bridge");
        bridge.ip("address add 10.0.2.2/24 dev guests");
        bridge.ip("link set guests up");
        Some(bridge)
    }

    fn ip(&self, what: &str) {
        ip(&format!("-n {} {what}", self.name)).expect(what);
    }

    fn within(&self) -> Vec<String> {
        ["ip", "netns", "exec", &self.name].map(str::to_owned).to_vec()
    }

    /// A VM that is plugged in.
    fn vm(&self, tap: &str, more: &[&str]) -> VmProcess {
        let plug = format!("--net=tap:{tap}");
        let vm = VmProcess::within(&self.within(), &[&SMALL[..], &[&plug], more].concat());
        self.ip(&format!("link set {tap} master guests up"));
        vm
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        // One that was never made cannot be removed.
        let _ = ip(&format!("netns delete {}", self.name));
    }
}

/// Asks the guest's service over and over, and writes the number that each answer has into a file;
/// ends when one is not the next.
const CLIENT: &str = r#"
exec 3<>/dev/tcp/10.0.2.15/7 || exit 1
asked=0
while asked=$((asked + 1)); do
    printf '12345678' >&3 || exit 2
    answer=$(head -c 16 <&3 | od -A n -t u8) || exit 3
    set -- $answer
    [ "$1" = "$asked" ] || { echo "answer $1 to request $asked" >&2; exit 4; }
    echo "$asked" > "$COUNT.new" && mv "$COUNT.new" "$COUNT"
done
"#;

#[test]
fn a_client_in_the_kernel_goes_on_when_the_primary_was_killed() {
    let what = "TAP";
    let Some(bridge) = Bridge::build() else { return };
    let folder = folder();
    let count = folder.path().join("count");
    let mut primary = bridge.vm("one", &[]);
    // A process that was killed is there until it has been waited for.
    let id = primary.process.id();
    let fence = format!("--fence=while kill -0 {id} 2>&-; do sleep 0.01; done");
    let mut secondary = bridge.vm("two", &["--incoming=defer", &fence]);
    for side in [&mut primary, &mut secondary] {
        side.switch_on(&["return-path", "x-colo"]);
    }
    let mut client = std::process::Command::new("ip");
    client.args(["netns", "exec", &bridge.name, "bash", "-c", CLIENT]).env("COUNT", &count);
    let client = Running::beside(client);
    let answers = || {
        let text = fs::read_to_string(&count).unwrap_or_default();
        text.trim().parse::<u64>().unwrap_or(0)
    };
    let more = |answered: u64, client: &Running| {
        until(&format!("{what}: answers; the client says: {}", client.err()), || {
            answers() > answered
        });
    };
    more(10, &client);
    let address = secondary.listen("tcp:127.0.0.1:0");
    primary.execute("migrate-set-parameters", json!({ "x-checkpoint-delay": 20 }));
    primary.execute("migrate", json!({ "uri": address }));
    primary.reaches("colo", what);
    secondary.reaches("colo", what);
    more(answers() + 10, &client);
    primary.process.kill();
    secondary.reaches("completed", what);
    more(answers() + 20, &client);
    secondary.expect_healthy(what);
    client.kill();
    secondary.quit(what);
}
