//! `jetdr enrol`: gets a part's certificate by a token.
//!
//! Invariant: a token is no argument of a program, since other users of the machine see those.

use crate::http::Server;
use crate::steps;
use anyhow::{Context, bail};
use std::io::Read;
use std::path::PathBuf;
use tls::{Folder, Role};

/// Who enrols by hand: the management server has its certificate from itself.
const HOLDERS: &[Role] = &[Role::Host, Role::Drva, Role::Operator];

/// What `jetdr enrol` takes.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// The management server: https://NAME:PORT.
    #[arg(long)]
    pub msa: Server,
    /// The file with the enrolment token, or `-` for standard input. Who the holder is, the token says.
    #[arg(long)]
    pub token_file: PathBuf,
    /// The authority's certificate, PEM, got from who runs the management server: by it the server is
    /// known. It is kept in the folder; left out, the one that is there counts.
    #[arg(long)]
    pub ca: Option<PathBuf>,
    /// The part's folder of certificates; it is made if it is missing.
    #[arg(long)]
    pub tls_dir: PathBuf,
}

/// Enrols, and says as whom.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let folder = Folder::at(&args.tls_dir);
    folder.make()?;
    let read =
        |ca: &PathBuf| std::fs::read(ca).with_context(|| format!("cannot read {}", ca.display()));
    let authority = args.ca.as_ref().map(read).transpose()?;
    if authority.is_none() && !folder.authority().exists() {
        bail!(
            "{} is missing: give the authority's certificate with --ca",
            folder.authority().display()
        );
    }
    let mut token = String::new();
    let what = || format!("cannot read the token from {}", args.token_file.display());
    if args.token_file.as_os_str() == "-" {
        std::io::stdin().take(4096).read_to_string(&mut token)
    } else {
        std::fs::File::open(&args.token_file)
            .and_then(|file| file.take(4096).read_to_string(&mut token))
    }
    .with_context(what)?;
    // Until all of it has come the folder stays as it was: a part that runs may be using it.
    let enrolled = steps::enrol(&folder, &args.msa, &token, authority.as_deref(), HOLDERS)?;
    // A part that is started without the server's address finds it here.
    folder.write(&folder.msa(), args.msa.to_string().as_bytes())?;
    println!(
        "enrolled as {} in {}",
        enrolled.identity,
        folder.path().display()
    );
    Ok(())
}
