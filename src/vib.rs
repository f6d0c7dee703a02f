//! `jetdr vib`: builds, signs, lists and checks packages and offline bundles. The work is in
//! `vib-packaging`; here are files, flags and what a person reads.

use anyhow::{Context, bail};
use clap::Subcommand;
use serde_json::json;
use std::fmt::Write as _;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use vib_packaging::component::{self, Firewall, Objects};
use vib_packaging::{
    AcceptanceLevel, Anchors, Builder, Bundle, BundleBuilder, EntryKind, Format, Limits, Policy,
    Report, Severity, Signer, Trust, Vib,
};

/// What is done with packages.
#[derive(Subcommand)]
pub enum Command {
    /// Build the host's package from a filter library and a daemon (`make vib` builds those too).
    Build(BuildArgs),
    /// Put packages into an offline bundle with one component.
    Bundle(BundleArgs),
    /// Show what is in a package or bundle, whoever made it.
    Inspect(InspectArgs),
    /// Check packages or bundles: exit code 0 if a host would take them all, else 1.
    Verify(VerifyArgs),
    /// Sign a package; only its signature changes.
    Sign(SignArgs),
}

/// A key and its certificates, both or neither.
#[derive(clap::Args)]
struct KeyArgs {
    /// Private key in PEM: RSA of 2048 to 4096 bits, or P-256.
    #[arg(long, requires = "cert")]
    key: Option<PathBuf>,
    /// Certificates in PEM: the key's own first, then its issuers'.
    #[arg(long, requires = "key")]
    cert: Option<PathBuf>,
}

#[derive(clap::Args)]
pub struct BuildArgs {
    /// The filter library, built for the host.
    #[arg(long)]
    library: PathBuf,
    /// The daemon, built for the host.
    #[arg(long)]
    daemon: PathBuf,
    /// Folder that the package goes to, under its id.
    #[arg(long, default_value = ".")]
    out: PathBuf,
    /// Payload: vgz, or tgz for hosts and tools that know no other.
    #[arg(long, default_value = "vgz", value_parser = parse_format)]
    format: Format,
    /// Acceptance level: certified, accepted, partner (these need --key), community.
    #[arg(long, default_value = "community")]
    level: AcceptanceLevel,
    /// `<version>-<release>`.
    #[arg(long, default_value = concat!(env!("CARGO_PKG_VERSION"), "-1"))]
    package_version: String,
    /// Release date, as 2026-01-31T12:00:00Z or in seconds since 1970. All times in the package.
    #[arg(long, env = "SOURCE_DATE_EPOCH")]
    date: String,
    /// Which way ports 32873-32878 are opened: outbound (the host dials), inbound, both.
    #[arg(long, default_value = "outbound")]
    firewall: Firewall,
    /// The management server's port, opened outbound: hosts get their certificates from there.
    #[arg(long, default_value_t = component::MSA_PORT, value_parser = clap::value_parser!(u16).range(1..))]
    msa_port: u16,
    #[command(flatten)]
    key: KeyArgs,
}

#[derive(clap::Args)]
pub struct BundleArgs {
    /// The packages.
    #[arg(required = true)]
    vibs: Vec<PathBuf>,
    /// Folder that the bundle goes to, under its id.
    #[arg(long, default_value = ".")]
    out: PathBuf,
    /// The component's name; begins with the vendor code.
    #[arg(long, default_value = component::NAME)]
    name: String,
    /// The component's name for people.
    #[arg(long, default_value = "jetdr I/O filter")]
    title: String,
    /// Three letters or digits.
    #[arg(long, default_value = component::VENDOR_CODE)]
    vendor_code: String,
    /// Versions of hosts; may be given again.
    #[arg(long = "platform", default_values = ["7.*", "8.*"])]
    platforms: Vec<String>,
    /// Where to read more.
    #[arg(long, default_value = "")]
    kb_url: String,
    /// Whom to ask.
    #[arg(long, default_value = "")]
    contact: String,
}

#[derive(clap::Args)]
pub struct InspectArgs {
    /// A package or a bundle.
    file: PathBuf,
    /// As one JSON document.
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
pub struct VerifyArgs {
    /// Packages or bundles.
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// Certificates in PEM that a signer may lead to.
    #[arg(long)]
    ca: Option<PathBuf>,
    /// Look neither at who signed nor at acceptance levels, like a host that installs with force.
    #[arg(long)]
    force: bool,
    /// The time at which certificates must be in force, instead of now.
    #[arg(long, value_name = "DATE")]
    at: Option<String>,
}

#[derive(clap::Args)]
pub struct SignArgs {
    /// The package.
    vib: PathBuf,
    /// The signed package; by default the package itself is replaced.
    #[arg(long)]
    out: Option<PathBuf>,
    #[command(flatten)]
    key: KeyArgs,
}

fn parse_format(text: &str) -> Result<Format, String> {
    Format::parse(text).ok_or_else(|| format!("`{text}` is neither tgz nor vgz"))
}

fn parse_time(text: &str) -> anyhow::Result<jiff::Timestamp> {
    let seconds = text
        .parse()
        .ok()
        .and_then(|s| jiff::Timestamp::from_second(s).ok());
    let time = seconds.or_else(|| text.parse().ok());
    time.with_context(|| {
        format!("`{text}` is no date: write 2026-01-31T12:00:00Z, or seconds since 1970")
    })
}

/// A time as descriptors have it.
fn iso(time: jiff::Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%S+00:00").to_string()
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    let limit = Limits::default().unpacked_bytes;
    let context = || format!("cannot read {}", path.display());
    let length = std::fs::metadata(path).with_context(context)?.len();
    if length > limit {
        bail!(
            "{} has {length} bytes, over {limit}: this is no package",
            path.display()
        );
    }
    std::fs::read(path).with_context(context)
}

/// Whole or not at all: a host may be fetching it.
fn write(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let write = || -> std::io::Result<()> {
        std::fs::create_dir_all(folder)?;
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        file.write_all(bytes)?;
        // Whatever the umask: a web server reads it too.
        file.as_file()
            .set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        Ok(())
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

fn name_of(path: &Path) -> String {
    path.file_name().map_or_else(
        || path.display().to_string(),
        |name| name.to_string_lossy().into_owned(),
    )
}

fn signer(args: &KeyArgs) -> anyhow::Result<Option<Signer>> {
    let (Some(key), Some(certificates)) = (&args.key, &args.cert) else {
        return Ok(None);
    };
    let (key_pem, certificates_pem) = (read(key)?, read(certificates)?);
    let (key, certificates) = (
        key.display().to_string(),
        certificates.display().to_string(),
    );
    Ok(Some(Signer::from_pem(
        (&key, &key_pem),
        (&certificates, &certificates_pem),
    )?))
}

/// Prints; whoever has read enough and closed the pipe is no error.
fn print(text: &str) -> anyhow::Result<()> {
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

/// Says what was found that does not stand in the way.
fn tell(report: &Report) {
    for finding in &report.findings {
        eprintln!("{}: {finding}", finding.rule.severity());
    }
}

/// Runs a command.
pub fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Build(args) => build(&args)?,
        Command::Bundle(args) => bundle(args)?,
        Command::Inspect(args) => return inspect(&args),
        Command::Verify(args) => return verify(&args),
        Command::Sign(args) => sign(&args)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn build(args: &BuildArgs) -> anyhow::Result<()> {
    let date = iso(parse_time(&args.date)?);
    let objects = Objects {
        library: read(&args.library)?,
        daemon: read(&args.daemon)?,
    };
    let builder = Builder {
        descriptor: component::descriptor(&args.package_version, &date, args.level),
        files: component::files_for(objects, &args.package_version, args.firewall, args.msa_port),
        payload: component::NAME.to_owned(),
        format: args.format,
        limits: Limits::default(),
    };
    let vib = builder.build(signer(&args.key)?.as_ref())?;
    tell(vib.report());
    let path = args.out.join(format!("{}.vib", vib.descriptor().id()));
    write(&path, vib.bytes())?;
    let mut out = String::new();
    let files = |entry: &&vib_packaging::Entry| entry.kind == EntryKind::File;
    for entry in vib.entries().iter().filter(files) {
        let _ = writeln!(
            out,
            "{:>9}  {:04o}  {}",
            entry.len_bytes, entry.mode, entry.path
        );
    }
    let _ = writeln!(out, "{:>9}        {}", vib.bytes().len(), path.display());
    print(&out)
}

fn open_vib(path: &Path) -> anyhow::Result<Vib> {
    let policy = Policy {
        trust: Trust::Unchecked,
        limits: Limits::default(),
    };
    Ok(Vib::open(&name_of(path), read(path)?, &policy, true)?)
}

fn bundle(args: BundleArgs) -> anyhow::Result<()> {
    let vibs = args
        .vibs
        .iter()
        .map(|path| open_vib(path))
        .collect::<anyhow::Result<Vec<Vib>>>()?;
    let first = vibs
        .first()
        .context("no package was given")?
        .descriptor()
        .clone();
    let builder = BundleBuilder {
        name: args.name,
        title: args.title,
        version: first.version,
        vendor: first.vendor,
        vendor_code: args.vendor_code,
        summary: first.summary,
        description: first.description,
        kb_url: args.kb_url,
        contact: args.contact,
        release_date: first.release_date,
        platforms: args.platforms,
        vibs,
    };
    let bundle = builder.build()?;
    tell(bundle.report());
    let path = args.out.join(format!("{}.zip", builder.id()));
    write(&path, bundle.bytes())?;
    print(&format!(
        "{:>9}        {}\n",
        bundle.bytes().len(),
        path.display()
    ))
}

fn sign(args: &SignArgs) -> anyhow::Result<()> {
    let Some(signer) = signer(&args.key)? else {
        bail!("nothing to sign with: give --key and --cert");
    };
    let vib = open_vib(&args.vib)?;
    let signed = vib_packaging::sign(&name_of(&args.vib), &vib, &signer)?;
    tell(signed.report());
    let path = args.out.as_ref().unwrap_or(&args.vib);
    write(path, signed.bytes())?;
    let signer = signed.signer().unwrap_or("nobody");
    print(&format!("{} is signed by {signer}\n", path.display()))
}

/// A package or a bundle, told by its first bytes.
enum Examined {
    Vib(Option<Box<Vib>>),
    Bundle(Option<Box<Bundle>>),
}

fn examine(path: &Path, policy: &Policy<'_>) -> anyhow::Result<(Examined, Report)> {
    let (name, bytes) = (name_of(path), read(path)?);
    Ok(if bytes.starts_with(b"PK") {
        let (bundle, report) = Bundle::examine(&name, bytes, policy);
        (Examined::Bundle(bundle.map(Box::new)), report)
    } else {
        let (vib, report) = Vib::examine(&name, bytes, policy);
        (Examined::Vib(vib.map(Box::new)), report)
    })
}

fn verify(args: &VerifyArgs) -> anyhow::Result<ExitCode> {
    let anchors = match &args.ca {
        Some(path) => Anchors::from_pem(&path.display().to_string(), &read(path)?)?,
        None => Anchors::default(),
    };
    let at = args.at.as_deref().map(parse_time).transpose()?;
    let at_s = at.map(|time| u64::try_from(time.as_second()).unwrap_or(0));
    let policy = Policy {
        trust: Trust::Anchors(&anchors, at_s),
        limits: Limits::default(),
    };
    let mut all_good = true;
    for file in &args.files {
        let (_, report) = examine(file, &policy)?;
        let good = report.accepted(args.force);
        all_good &= good;
        tell(&report);
        let verdict = match (good, report.worst()) {
            (true, None | Some(Severity::Advice)) => "good",
            (true, _) => "good for a host that installs with force",
            (false, Some(Severity::NeedsForce)) => "NOT good: a host takes it with force only",
            (false, _) => "NOT good",
        };
        print(&format!("{}: {verdict}\n", file.display()))?;
    }
    Ok(if all_good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn vib_json(vib: &Vib) -> serde_json::Value {
    let descriptor = vib.descriptor();
    let entries = vib.entries().iter().map(|entry| {
        let mode = format!("{:04o}", entry.mode);
        json!({"path": entry.path, "folder": entry.kind == EntryKind::Folder, "mode": mode, "len_bytes": entry.len_bytes})
    });
    let relations = &descriptor.relationships.depends;
    let depends = relations.iter().map(|depends| match &depends.version {
        Some((relation, version)) => format!("{} {relation} {version}", depends.name),
        None => depends.name.clone(),
    });
    json!({
        "id": descriptor.id(),
        "name": descriptor.name,
        "version": descriptor.version,
        "vendor": descriptor.vendor,
        "summary": descriptor.summary,
        "release_date": descriptor.release_date,
        "acceptance_level": descriptor.acceptance_level.name(),
        "signer": vib.signer(),
        "sha256": vib_packaging::sha256(vib.bytes()),
        "len_bytes": vib.bytes().len(),
        "depends": depends.collect::<Vec<_>>(),
        "members": vib.members().map(|(name, len_bytes)| json!({"name": name, "len_bytes": len_bytes})).collect::<Vec<_>>(),
        "entries": entries.collect::<Vec<_>>(),
    })
}

/// For people: a line a value, a line an entry.
fn show(vib: &Vib) -> String {
    let mut out = String::new();
    let value = vib_json(vib);
    for key in [
        "id",
        "summary",
        "vendor",
        "release_date",
        "acceptance_level",
        "signer",
        "sha256",
        "len_bytes",
        "depends",
    ] {
        let shown = match &value[key] {
            serde_json::Value::String(text) => text.escape_debug().to_string(),
            serde_json::Value::Null => "nobody".into(),
            other => other.to_string(),
        };
        let _ = writeln!(out, "{key:<17} {shown}");
    }
    let _ = writeln!(out, "members");
    for (name, len_bytes) in vib.members() {
        let _ = writeln!(out, "{len_bytes:>9}        {name}");
    }
    let _ = writeln!(out, "entries");
    for entry in vib.entries() {
        let end = if entry.kind == EntryKind::Folder {
            "/"
        } else {
            ""
        };
        let _ = writeln!(
            out,
            "{:>9}  {:04o}  {}{end}",
            entry.len_bytes, entry.mode, entry.path
        );
    }
    out
}

fn inspect(args: &InspectArgs) -> anyhow::Result<ExitCode> {
    let policy = Policy {
        trust: Trust::Unchecked,
        limits: Limits::default(),
    };
    let (examined, report) = examine(&args.file, &policy)?;
    let readable = matches!(
        &examined,
        Examined::Vib(Some(_)) | Examined::Bundle(Some(_))
    );
    if args.json {
        let findings = report.findings.iter().map(|found| {
            json!({"rule": found.rule.name(), "severity": found.rule.severity().to_string(), "file": found.file,
                "element": found.element, "problem": found.problem, "remedy": found.rule.remedy()})
        });
        let (vib, bundle) = match &examined {
            Examined::Vib(vib) => (vib.as_deref().map(vib_json), None),
            Examined::Bundle(bundle) => (None, bundle.as_deref().map(|bundle| {
                json!({"bulletins": bundle.bulletins(), "vibs": bundle.vibs().iter().map(vib_json).collect::<Vec<_>>()})
            })),
        };
        let found = json!({"vib": vib, "bundle": bundle, "findings": findings.collect::<Vec<_>>()});
        print(&format!("{found}\n"))?;
    } else {
        let mut out = String::new();
        match &examined {
            Examined::Vib(vib) => out.extend(vib.iter().map(|vib| show(vib))),
            Examined::Bundle(bundle) => {
                for id in bundle.iter().flat_map(|bundle| bundle.bulletins()) {
                    let _ = writeln!(out, "bulletin          {}", id.escape_debug());
                }
                out.extend(bundle.iter().flat_map(|bundle| bundle.vibs()).map(show));
            }
        }
        print(&out)?;
        tell(&report);
    }
    Ok(if readable {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
