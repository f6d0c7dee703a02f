//! Disks come back byte for byte, in each form, also after an interruption.
#![allow(clippy::unwrap_used)]

use filter_core::record::{RecordHeader, RecordKind, RecordRef};
use recovery_store::{
    CutMeta, CutSelector, CutWriter, DiskInfo, DomainInfo, StoreUrl, WriterOptions,
};
use rocva::{Format, Progress, RecoverRequest, recover};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output};
use uuid::Uuid;

struct Filled {
    dir: tempfile::TempDir,
    /// Per disk, its bytes at cut 1 and at cut 2.
    disks: Vec<(DiskInfo, [Vec<u8>; 2])>,
}

impl Filled {
    fn url(&self) -> String {
        self.store().to_str().unwrap().to_owned()
    }

    fn store(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    fn out(&self) -> PathBuf {
        self.dir.path().join("out")
    }

    fn request(&self, format: Format) -> RecoverRequest {
        RecoverRequest {
            from: StoreUrl::parse(&self.url(), &[]).expect("parses"),
            out: self.out(),
            cut: CutSelector::Latest,
            disks: Vec::new(),
            format,
            force: false,
        }
    }
}

fn splitmix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Two disks, two cuts ("first" and unnamed). The large disk needs several grain tables, and its end is
/// not the end of a grain.
async fn fill() -> Filled {
    let dir = tempfile::tempdir().expect("a folder");
    let url = StoreUrl::parse(dir.path().join("store").to_str().unwrap(), &[]).expect("parses");
    let options = WriterOptions {
        part_bytes: 256 << 10,
        ..WriterOptions::default()
    };
    let domain = DomainInfo::new(Uuid::from_u128(1), "domain");
    let mut writer = CutWriter::open(&url, &domain, options)
        .await
        .expect("opens");
    let mut disks = Vec::new();
    for (number, capacity_bytes) in [(1, (96 << 20) + 4608), (2, 5 << 20)] {
        let info = DiskInfo {
            uuid: Uuid::from_u128(0x100 + number),
            vm_uuid: Uuid::from_u128(9),
            vm_name: "web server".into(),
            name: format!("disk{number}"),
            capacity_bytes,
        };
        writer.set_disk(info.clone()).expect("is new");
        disks.push((info, [vec![0; capacity_bytes as usize], Vec::new()]));
    }
    let mut random = 42;
    let mut seq = 0;
    for cut in 0..2 {
        for _ in 0..150 {
            seq += 1;
            for (info, bytes) in &mut disks {
                let kind = match splitmix(&mut random) % 8 {
                    0 => RecordKind::Zero,
                    _ => RecordKind::Write,
                };
                let len = 512 * (1 + splitmix(&mut random) % 60);
                let sectors = (info.capacity_bytes - len) / 512;
                let mut offset = splitmix(&mut random) % (sectors + 1) * 512;
                if seq == 1 {
                    // The very end, too.
                    offset = info.capacity_bytes - len;
                }
                let mut payload = Vec::new();
                let range = offset as usize..(offset + len) as usize;
                if kind == RecordKind::Write {
                    payload = vec![splitmix(&mut random) as u8; len as usize];
                    for byte in payload.iter_mut().step_by(3) {
                        *byte = splitmix(&mut random) as u8;
                    }
                    bytes[cut][range].copy_from_slice(&payload);
                } else {
                    bytes[cut][range].fill(0);
                }
                let header = RecordHeader {
                    kind,
                    flags: 0,
                    payload_len: payload.len() as u32,
                    payload_crc: 0,
                    seq,
                    stamp: seq,
                    offset_bytes: offset,
                    attach_epoch: 1,
                    cut_epoch: 1,
                    time_ns: 0,
                    range_len: len as u32,
                };
                let record = RecordRef {
                    header,
                    payload: &payload,
                };
                writer.apply(info.uuid, &record).await.expect("is taken");
            }
        }
        let meta = CutMeta {
            time_ns: 1_700_000_000_000_000_000 + cut as u64,
            name: (cut == 0).then(|| "first".into()),
            positions: disks.iter().map(|(info, _)| (info.uuid, seq)).collect(),
            ..CutMeta::default()
        };
        writer.commit(meta).await.expect("commits");
        if cut == 0 {
            for (_, bytes) in &mut disks {
                bytes[1] = bytes[0].clone();
            }
        }
    }
    Filled { dir, disks }
}

fn qemu_img(args: &[&str]) -> Output {
    Command::new("qemu-img")
        .args(args)
        .output()
        .expect("qemu-img is installed (Debian: qemu-utils)")
}

fn assert_qemu_img(args: &[&str]) {
    let output = qemu_img(args);
    assert!(output.status.success(), "qemu-img {args:?}: {output:?}");
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .expect("lists")
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn raw_disks_equal_the_model_at_each_cut() {
    let filled = fill().await;
    for (number, cut) in [
        (0, CutSelector::Name("first".into())),
        (1, CutSelector::Latest),
    ] {
        let request = RecoverRequest {
            cut,
            out: filled.out().join(number.to_string()),
            ..filled.request(Format::Raw)
        };
        let report = recover(&request, &Progress::Silent)
            .await
            .expect("recovers");
        assert_eq!(report.disks.len(), 2);
        for (recovered, (info, bytes)) in report.disks.iter().zip(&filled.disks) {
            assert_eq!(recovered.uuid, info.uuid);
            let read = std::fs::read(&recovered.path).expect("reads");
            assert!(read == bytes[number], "disk {} at cut {number}", info.name);
            // Sparse: what was never written takes no room.
            use std::os::unix::fs::MetadataExt;
            let meta = std::fs::metadata(&recovered.path).expect("is there");
            assert!(meta.blocks() * 512 < recovered.data_bytes * 2 + (1 << 20));
        }
        assert_eq!(
            names(&request.out),
            ["web_server-disk1.raw", "web_server-disk2.raw"]
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn qemu_reads_both_kinds_of_vmdk() {
    let filled = fill().await;
    let raw = filled.dir.path().join("model.raw");
    for (format, files) in [(Format::VmdkFlat, 4), (Format::VmdkStream, 2)] {
        let request = RecoverRequest {
            out: filled.out().join(format!("{format:?}")),
            ..filled.request(format)
        };
        let report = recover(&request, &Progress::Silent)
            .await
            .expect("recovers");
        assert_eq!(
            names(&request.out).len(),
            files,
            "{:?}",
            names(&request.out)
        );
        for (recovered, (_, bytes)) in report.disks.iter().zip(&filled.disks) {
            std::fs::write(&raw, &bytes[1]).unwrap();
            let path = recovered.path.to_str().unwrap();
            // qemu's check covers sparse extents only: exit code 63 says that it cannot check.
            if format == Format::VmdkStream {
                assert_qemu_img(&["check", "-f", "vmdk", path]);
            }
            assert_qemu_img(&[
                "compare",
                "-f",
                "vmdk",
                "-F",
                "raw",
                path,
                raw.to_str().unwrap(),
            ]);
            let info = qemu_img(&["info", "--output=json", "-f", "vmdk", path]);
            let info: serde_json::Value = serde_json::from_slice(&info.stdout).expect("is JSON");
            assert_eq!(info["virtual-size"], bytes[1].len());
            let kind = match format {
                Format::VmdkFlat => "monolithicFlat",
                _ => "streamOptimized",
            };
            assert_eq!(info["format-specific"]["data"]["create-type"], kind);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interrupted_recovery_is_taken_up_again() {
    let filled = fill().await;
    // A block of the second cut is damaged: the recovery stops in the middle.
    let cuts = filled.store().join("t/0000000001/cuts");
    let victim = cuts.join("00000000000000000002-00000001.jds");
    let good = std::fs::read(&victim).unwrap();
    let mut bad = good.clone();
    bad[200] ^= 1;
    std::fs::write(&victim, &bad).unwrap();
    let request = RecoverRequest {
        disks: vec!["disk1".into()],
        ..filled.request(Format::Raw)
    };
    let error = recover(&request, &Progress::Silent)
        .await
        .expect_err("is damaged");
    let text = format!("{error:#}");
    assert!(
        text.contains(victim.file_name().unwrap().to_str().unwrap()),
        "{text}"
    );
    let target = filled.out().join("web_server-disk1.raw");
    assert!(!target.exists(), "nothing unfinished has the final name");
    let partial = filled.out().join("web_server-disk1.raw.partial");
    assert!(partial.exists(), "{text}");

    std::fs::write(&victim, &good).unwrap();
    let state = filled.out().join("web_server-disk1.raw.partial.state");
    let report = recover(&request, &Progress::Silent)
        .await
        .expect("recovers");
    assert!(!state.exists());
    assert_eq!(report.disks.len(), 1);
    assert!(
        report.disks[0].resumed_portions > 0,
        "nothing is fetched twice"
    );
    assert!(std::fs::read(&target).unwrap() == filled.disks[0].1[1]);

    // Again: refused, as the file is there; by force it is replaced.
    let error = recover(&request, &Progress::Silent)
        .await
        .expect_err("is there");
    assert!(format!("{error:#}").contains("--force"), "{error:#}");
    let forced = RecoverRequest {
        force: true,
        cut: CutSelector::Number(1),
        ..request
    };
    recover(&forced, &Progress::Silent).await.expect("recovers");
    assert!(std::fs::read(&target).unwrap() == filled.disks[0].1[0]);
    assert_eq!(names(&filled.out()), ["web_server-disk1.raw"]);
}

/// Runs the command line as an operator would.
fn command(args: &[&str]) -> anyhow::Result<ExitCode> {
    #[derive(clap::Parser)]
    struct Cli {
        #[command(flatten)]
        args: rocva::Args,
    }
    let args = ["rocva"].iter().chain(args);
    rocva::run(<Cli as clap::Parser>::try_parse_from(args)?.args)
}

#[test]
fn the_command_line_says_what_is_wrong() {
    let runtime = tokio::runtime::Runtime::new().expect("starts");
    let filled = runtime.block_on(fill());
    let url = filled.url();
    let is = |code: ExitCode, expected: ExitCode| format!("{code:?}") == format!("{expected:?}");
    for json in [&[][..], &["--json"][..]] {
        let with = |args: &[&'static str]| {
            let mut all: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
            all.extend(["--from".to_owned(), url.clone()]);
            all.extend(json.iter().map(|arg| (*arg).to_owned()));
            let all: Vec<&str> = all.iter().map(String::as_str).collect();
            command(&all)
        };
        assert!(is(with(&["list"]).expect("lists"), ExitCode::SUCCESS));
        assert!(is(with(&["verify"]).expect("verifies"), ExitCode::SUCCESS));
        let error =
            with(&["recover", "--out", "/dev/null/x", "--disk", "nope"]).expect_err("no disk");
        assert!(format!("{error:#}").contains("nope"), "{error:#}");
        let error = with(&["recover", "--out", "/dev/null/x"]).expect_err("no folder");
        assert!(format!("{error:#}").contains("/dev/null/x"), "{error:#}");
        let error = with(&["recover", "--out", "/dev/null/x", "--cut", "9"]).expect_err("no cut");
        assert!(format!("{error:#}").contains("cut 9"), "{error:#}");
    }
    let cuts = filled.store().join("t/0000000001/cuts");
    let first = cuts.join(&names(&cuts)[0]);
    std::fs::remove_file(first).unwrap();
    let code = command(&["verify", "--from", &url]).expect("reads");
    assert!(is(code, ExitCode::FAILURE));
    let error = command(&["verify", "--from", "/dev/null/x"]).expect_err("no store");
    assert!(format!("{error:#}").contains("/dev/null/x"), "{error:#}");
}
