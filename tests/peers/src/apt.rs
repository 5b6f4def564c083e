//! A private apt: the machine's own mirrors and keys, but lists, cache and status of our own, so
//! that nothing installed changes and no rights are needed.
//!
//! The status file is empty: apt then names the whole closure of a package, down to the C
//! library, and what we unpack runs whatever this machine has installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

/// One origin of packages, as the machine's own configuration has it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Origin {
    uris: String,
    suite: String,
    /// The value of `Signed-By`, which may be a whole key on continuation lines.
    signed_by: Option<String>,
}

/// A version of a package, and the suite that has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// Debian's full version, such as `1:10.0.2+ds-2`.
    pub version: String,
    /// Such as `bookworm-backports`.
    pub suite: String,
}

impl Offer {
    /// The version without Debian's epoch.
    #[must_use]
    pub fn upstream(&self) -> &str {
        self.version.split_once(':').map_or(self.version.as_str(), |(_, version)| version)
    }
}

/// The private apt, with its lists fetched.
#[derive(Debug)]
pub struct Apt {
    folder: PathBuf,
}

impl Apt {
    /// Sets up `folder` and fetches the package lists of this machine's release and of its
    /// backports.
    ///
    /// # Errors
    /// In one line: no apt here, a release without usable sources, or no network.
    pub fn new(folder: &Path) -> Result<Self> {
        let codename = codename(&fs::read_to_string("/etc/os-release").unwrap_or_default())
            .context("no apt here: /etc/os-release names no release")?;
        ensure!(Path::new("/usr/bin/apt-get").exists(), "no apt here: /usr/bin/apt-get is missing");
        let origins = with_backports(machine_origins()?, &codename);
        ensure!(!origins.is_empty(), "no apt source of the release {codename} on this machine");
        for below in ["lists/partial", "cache/archives/partial", "sources.d"] {
            fs::create_dir_all(folder.join(below))
                .with_context(|| folder.join(below).display().to_string())?;
        }
        fs::write(folder.join("status"), "")?;
        fs::write(folder.join("sources.d/peers.sources"), deb822(&origins))?;
        let apt = Self { folder: folder.to_owned() };
        run(apt.command("apt-get").arg("update"))?;
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let folder = self.folder.display();
        for option in [
            "Dir::Etc::sourcelist=/dev/null".to_owned(),
            format!("Dir::Etc::sourceparts={folder}/sources.d"),
            format!("Dir::State::lists={folder}/lists"),
            format!("Dir::State::status={folder}/status"),
            format!("Dir::Cache={folder}/cache"),
            // Nobody else uses these folders, and the system's locks are not ours to take.
            "Debug::NoLocking=1".to_owned(),
            // Run by root, apt would fetch as `_apt`, who cannot write here.
            "APT::Sandbox::User=".to_owned(),
            "Acquire::Retries=3".to_owned(),
        ] {
            command.arg("-o").arg(option);
        }
        if program == "apt-get" {
            command.args(["-q", "-y"]);
        }
        command.env("LC_ALL", "C").env("DEBIAN_FRONTEND", "noninteractive");
        command
    }

    /// The versions of `package` on offer, newest first.
    ///
    /// # Errors
    /// apt's own, in one line.
    pub fn offers(&self, package: &str) -> Result<Vec<Offer>> {
        let printed = run(self.command("apt-cache").args(["madison", package]))?;
        Ok(parse_madison(&printed))
    }

    /// The packages that `package` depends on directly.
    ///
    /// # Errors
    /// apt's own, in one line.
    pub fn depends(&self, package: &str) -> Result<Vec<String>> {
        let printed = run(self.command("apt-cache").args(["depends", package]))?;
        Ok(printed
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "))
            .map(str::to_owned)
            .collect())
    }

    /// Fetches `package` with everything it depends on, and unpacks it all below `root`.
    ///
    /// # Errors
    /// apt's or dpkg's own, in one line.
    pub fn unpack_closure(&self, package: &str, offer: &Offer, root: &Path) -> Result<()> {
        let archives = self.archives(&format!("{package}-{}", offer.upstream()))?;
        let mut command = self.command("apt-get");
        command.arg("-o").arg(format!("Dir::Cache::archives={}", archives.display()));
        command.args(["install", "--download-only", "--no-install-recommends"]);
        if offer.suite.ends_with("-backports") {
            // Its companions of the same version are there too, at a priority nobody asks for.
            command.args(["--target-release", &offer.suite]);
        }
        run(command.arg(format!("{package}={}", offer.version)))?;
        unpack_all(&archives, root)
    }

    /// Fetches `packages`, without what they depend on, and unpacks them below `root`.
    ///
    /// # Errors
    /// apt's or dpkg's own, in one line.
    pub fn unpack_alone(&self, packages: &[&str], root: &Path) -> Result<()> {
        let archives = self.archives(&packages.join("+"))?;
        run(self.command("apt-get").current_dir(&archives).arg("download").args(packages))?;
        unpack_all(&archives, root)
    }

    fn archives(&self, name: &str) -> Result<PathBuf> {
        let archives = self.folder.join("archives").join(name);
        fs::create_dir_all(archives.join("partial"))?;
        Ok(archives)
    }
}

fn unpack_all(archives: &Path, root: &Path) -> Result<()> {
    fs::create_dir_all(root)?;
    for entry in fs::read_dir(archives)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            run(Command::new("dpkg-deb").arg("-x").arg(path).arg(root))?;
        }
    }
    // Unpacked, they are only ballast.
    fs::remove_dir_all(archives)?;
    Ok(())
}

/// Runs a command to its end and gives what it printed; its last complaint is the error.
fn run(command: &mut Command) -> Result<String> {
    let program = command.get_program().display().to_string();
    let output = command.output().with_context(|| format!("{program} did not start"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let complaints = String::from_utf8_lossy(&output.stderr).into_owned();
    let why = complaints
        .lines()
        .find(|line| line.starts_with("E:"))
        .or_else(|| complaints.lines().last())
        .unwrap_or("no reason given");
    bail!("{program} ({}): {why}", output.status)
}

fn codename(os_release: &str) -> Option<String> {
    let value = os_release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="))?;
    let value = value.trim_matches('"');
    (!value.is_empty()).then(|| value.to_owned())
}

/// Everything the machine's own configuration names.
fn machine_origins() -> Result<Vec<Origin>> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(folder) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(folder.filter_map(|entry| Some(entry.ok()?.path())));
    }
    files.sort();
    let mut origins = Vec::new();
    for file in files {
        let extension = file.extension().and_then(|extension| extension.to_str());
        let Ok(text) = fs::read_to_string(&file) else { continue };
        match extension {
            Some("list") => origins.extend(text.lines().filter_map(parse_one_line)),
            Some("sources") => origins.extend(parse_deb822(&text)),
            Some(_) | None => {}
        }
    }
    Ok(origins)
}

/// `deb [signed-by=KEYRING arch=..] URI SUITE COMPONENT..`
fn parse_one_line(line: &str) -> Option<Origin> {
    let rest = line.trim().strip_prefix("deb ")?.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?,
        None => ("", rest),
    };
    let mut words = rest.split_whitespace();
    let (uri, suite) = (words.next()?, words.next()?);
    let signed_by = options
        .split_whitespace()
        .find_map(|option| option.strip_prefix("signed-by="))
        .map(str::to_owned);
    Some(Origin { uris: uri.to_owned(), suite: suite.to_owned(), signed_by })
}

/// Stanzas of `Field: value`, a value going on over indented lines.
fn parse_deb822(text: &str) -> Vec<Origin> {
    let mut origins = Vec::new();
    let without_comments: Vec<&str> =
        text.lines().filter(|line| !line.starts_with('#')).map(str::trim_end).collect();
    for stanza in without_comments.split(|line| line.is_empty()) {
        let mut fields: Vec<(String, String)> = Vec::new();
        for line in stanza {
            if line.starts_with([' ', '\t']) {
                if let Some((_, value)) = fields.last_mut() {
                    value.push('\n');
                    value.push_str(line);
                }
            } else if let Some((field, value)) = line.split_once(':') {
                fields.push((field.to_ascii_lowercase(), value.trim().to_owned()));
            }
        }
        let field = |name: &str| {
            fields.iter().find(|(field, _)| field == name).map(|(_, value)| value.as_str())
        };
        let binary = field("types").is_some_and(|types| types.split(' ').any(|kind| kind == "deb"));
        let disabled = field("enabled").is_some_and(|enabled| enabled == "no");
        let (Some(uris), Some(suites)) = (field("uris"), field("suites")) else { continue };
        if !binary || disabled {
            continue;
        }
        for suite in suites.split_whitespace() {
            origins.push(Origin {
                uris: uris.to_owned(),
                suite: suite.to_owned(),
                signed_by: field("signed-by").map(str::to_owned),
            });
        }
    }
    origins
}

/// Keeps what belongs to the release, and adds its backports beside its main suite.
fn with_backports(origins: Vec<Origin>, codename: &str) -> Vec<Origin> {
    let ours = |suite: &str| {
        suite == codename || suite.strip_prefix(codename).is_some_and(|rest| rest.starts_with('-'))
    };
    let mut kept: Vec<Origin> = origins.into_iter().filter(|origin| ours(&origin.suite)).collect();
    let backports = format!("{codename}-backports");
    if !kept.iter().any(|origin| origin.suite == backports) {
        let main = kept.iter().find(|origin| origin.suite == codename).cloned();
        kept.extend(main.map(|origin| Origin { suite: backports, ..origin }));
    }
    kept
}

fn deb822(origins: &[Origin]) -> String {
    let mut text = String::new();
    for origin in origins {
        let Origin { uris, suite, signed_by } = origin;
        text += &format!("Types: deb\nURIs: {uris}\nSuites: {suite}\nComponents: main\n");
        if let Some(signed_by) = signed_by {
            text += &format!("Signed-By: {signed_by}\n");
        }
        text.push('\n');
    }
    text
}

/// `package | version | URI suite/component arch Packages`
fn parse_madison(printed: &str) -> Vec<Offer> {
    let mut offers = Vec::new();
    for line in printed.lines() {
        let mut columns = line.split('|').map(str::trim);
        let (Some(_), Some(version), Some(place)) =
            (columns.next(), columns.next(), columns.next())
        else {
            continue;
        };
        let Some((suite, _)) = place.split(' ').nth(1).and_then(|word| word.rsplit_once('/'))
        else {
            continue;
        };
        offers.push(Offer { version: version.to_owned(), suite: suite.to_owned() });
    }
    offers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_formats_of_sources_are_read_and_backports_added() {
        let stanza = "# a comment\nTypes: deb deb-src\nURIs: http://mirror.example/debian\n\
            Suites: bookworm bookworm-updates\nComponents: main\nSigned-By:\n -----BEGIN\n key\n\n\
            Types: deb\nEnabled: no\nURIs: http://off.example\nSuites: bookworm\n";
        let mut origins = parse_deb822(stanza);
        assert_eq!(origins.len(), 2);
        assert_eq!(origins[0].signed_by.as_deref(), Some("\n -----BEGIN\n key"));
        origins.extend(parse_one_line(
            "deb [arch=amd64 signed-by=/k.gpg] http://mirror.example/sec bookworm-security main",
        ));
        origins.extend(parse_one_line("deb http://other.example/apt cloud-bookworm main"));
        assert_eq!(parse_one_line("# deb http://mirror.example x main"), None);

        let kept = with_backports(origins, "bookworm");
        let suites: Vec<&str> = kept.iter().map(|origin| origin.suite.as_str()).collect();
        assert_eq!(
            suites,
            ["bookworm", "bookworm-updates", "bookworm-security", "bookworm-backports"]
        );
        assert_eq!(kept[2].signed_by.as_deref(), Some("/k.gpg"));
        assert_eq!(parse_deb822(&deb822(&kept)), kept);
    }

    #[test]
    fn offers_are_read() {
        let offers = parse_madison(
            "qemu-system-x86 | 1:10.0.2+ds-2~bpo12+1 | http://m.example/debian bookworm-backports/main amd64 Packages\n\
             qemu-system-x86 | 1:7.2+dfsg-7 | http://m.example/debian bookworm/main amd64 Packages\n",
        );
        assert_eq!(offers[0].suite, "bookworm-backports");
        assert_eq!(offers[1].upstream(), "7.2+dfsg-7");
    }
}
