//! Real clients of the NBD server alone: what it offers, and that every byte comes where it belongs.
#![allow(clippy::unwrap_used)]

mod nbd_support;

use nbd_support::{assert_same, bytes, ok, run, serve, serve_in, tool};
use serde_json::{Value, json};
use std::os::unix::fs::{FileExt, MetadataExt};

const MIB: u64 = 1 << 20;

fn nbdinfo(arguments: &[&str], uri: &str) -> Value {
    let said = ok(tool("nbdinfo").arg("--json").args(arguments).arg(uri));
    serde_json::from_str(&said).unwrap()
}

#[test]
fn nbdinfo_sees_all_that_is_offered() {
    let served = serve(64 * MIB);
    for uri in served.uris() {
        let info = nbdinfo(&[], &uri);
        assert_eq!(info["protocol"], "newstyle-fixed", "{info}");
        assert_eq!(info["structured"], true, "{info}");
        let export = &info["exports"][0];
        for (key, value) in [
            ("export-name", json!("disk")),
            ("export-size", json!(64 * MIB)),
            ("is_read_only", json!(false)),
            ("is_rotational", json!(false)),
            ("can_cache", json!(true)),
            ("can_df", json!(true)),
            ("can_fast_zero", json!(true)),
            ("can_flush", json!(true)),
            ("can_fua", json!(true)),
            ("can_multi_conn", json!(true)),
            ("can_trim", json!(true)),
            ("can_zero", json!(true)),
            ("block_size_minimum", json!(512)),
            ("block_size_preferred", json!(4096)),
            ("block_size_maximum", json!(32 * MIB)),
            ("contexts", json!(["base:allocation"])),
        ] {
            assert_eq!(export[key], value, "{key}: {info}");
        }
    }
    // The default export has an empty name; the list has the real one.
    let default = served.unix_uri().replace("/disk?", "/?");
    assert_eq!(nbdinfo(&["--size"], &default), json!(64 * MIB));
    let list = nbdinfo(&["--list"], &default);
    assert_eq!(list["exports"][0]["export-name"], "disk", "{list}");
    assert_eq!(list["exports"].as_array().unwrap().len(), 1, "{list}");
    let unknown = served.unix_uri().replace("/disk?", "/none?");
    let refused = run(tool("nbdinfo").arg(unknown));
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("none"), "{said}");
    served.stop();
}

#[test]
fn nbdinfo_maps_holes_and_data() {
    let served = serve(64 * MIB);
    let file = std::fs::File::options().write(true).open(&served.disk);
    let file = file.unwrap();
    file.write_all_at(&bytes(256 << 10, 1), MIB).unwrap();
    file.write_all_at(&bytes(MIB as usize, 2), 63 * MIB)
        .unwrap();
    file.sync_all().unwrap();
    for uri in served.uris() {
        let map = nbdinfo(&["--map"], &uri);
        let extent = |offset: u64, length: u64, kind: u32| {
            let description = if kind == 0 { "data" } else { "hole,zero" };
            json!({"offset": offset, "length": length, "type": kind, "description": description})
        };
        let expected = json!([
            extent(0, MIB, 3),
            extent(MIB, 256 << 10, 0),
            extent(MIB + (256 << 10), 62 * MIB - (256 << 10), 3),
            extent(63 * MIB, MIB, 0),
        ]);
        assert_eq!(map, expected);
    }
    served.stop();
}

#[test]
fn nbdcopy_both_ways() {
    let len = 40 * MIB;
    let served = serve(len);
    let (source, back) = (served.at("source"), served.at("back"));
    for (seed, uri) in served.uris().iter().enumerate() {
        let mut data = bytes(len as usize, 10 + seed as u64);
        // A hole and zeros: they are copied as such.
        data[(5 * MIB) as usize..(9 * MIB) as usize].fill(0);
        std::fs::write(&source, &data).unwrap();
        for more in [
            &["--connections=4"][..],
            &["--synchronous"],
            &["--no-extents"],
        ] {
            ok(tool("nbdcopy")
                .args(more)
                .arg("--flush")
                .arg(&source)
                .arg(uri));
            assert_same(&source, &served.disk);
            let _ = std::fs::remove_file(&back);
            std::fs::File::create_new(&back)
                .unwrap()
                .set_len(len)
                .unwrap();
            ok(tool("nbdcopy").args(more).arg(uri).arg(&back));
            assert_same(&source, &back);
            // Shuffled, so that the next round cannot pass by what is there already.
            data.rotate_left(4096);
            std::fs::write(&source, &data).unwrap();
        }
    }
    served.stop();
}

#[test]
fn qemu_img_converts_and_compares() {
    let len = 24 * MIB;
    let served = serve(len);
    let (source, back) = (served.at("source"), served.at("back.qcow2"));
    let mut data = bytes(len as usize, 3);
    data[MIB as usize..(7 * MIB) as usize].fill(0);
    std::fs::write(&source, &data).unwrap();
    for uri in served.uris() {
        // Stale bytes everywhere: what the source has as zeros must become zeros here.
        std::fs::write(&served.disk, bytes(len as usize, 4)).unwrap();
        let mut convert = tool("qemu-img");
        convert.args(["convert", "-n", "-f", "raw", "-O", "raw"]);
        ok(convert.arg(&source).arg(&uri));
        assert_same(&source, &served.disk);
        let mut compare = tool("qemu-img");
        compare.args(["compare", "-f", "raw", "-F", "raw"]);
        let said = ok(compare.arg(&source).arg(&uri));
        assert!(said.contains("identical"), "{said}");
        let mut convert = tool("qemu-img");
        convert.args(["convert", "-m", "16", "-W", "-f", "raw", "-O", "qcow2"]);
        ok(convert.arg(&uri).arg(&back));
        let mut compare = tool("qemu-img");
        compare.args(["compare", "-f", "qcow2", "-F", "raw"]);
        ok(compare.arg(&back).arg(&source));
    }
    served.stop();
}

#[test]
fn qemu_img_and_nbdinfo_read_a_vmdk() {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("d.vmdk");
    let mut create = std::process::Command::new(env!("CARGO_BIN_EXE_simhost"));
    ok(create.arg("create").arg(&disk).arg("8M"));
    let again = run(&mut create);
    assert!(!again.status.success(), "a disk was made over another");
    let served = serve_in(folder, disk);
    let mut io = tool("qemu-io");
    io.args(["-f", "raw", "-c", "write -P 5 3M 1M"]);
    ok(io.arg(served.unix_uri()));
    let mut compare = tool("qemu-img");
    compare.args(["compare", "-f", "vmdk", "-F", "raw"]);
    ok(compare.arg(&served.disk).arg(served.unix_uri()));
    served.stop();
}

/// Each command of qemu-io in one session; none may fail.
fn qemu_io(uri: &str, commands: &[&str]) {
    let mut io = tool("qemu-io");
    io.args(["-f", "raw", "--cache=none", "--discard=unmap"]);
    for command in commands {
        io.args(["-c", command]);
    }
    let said = ok(io.arg(uri));
    for bad in ["failed", "error", "Pattern verification"] {
        assert!(!said.contains(bad), "{commands:?}: {said}");
    }
}

#[test]
fn qemu_io_patterns_are_read_back() {
    let served = serve(32 * MIB);
    for uri in served.uris() {
        std::fs::write(&served.disk, bytes(32 << 20, 5)).unwrap();
        qemu_io(
            &uri,
            &[
                "write -P 1 0 8M",
                "write -f -P 2 1M 64k", // FUA
                "write -z 2M 1M",       // zeros, the space stays
                "write -z -u 4M 1M",    // zeros, the space may go
                "write -z -f 7M 512k",  // zeros, FUA
                "discard 6M 1M",
                "write -P 3 2560k 512",
                "flush",
                "read -P 1 0 1M",
                "read -P 2 1M 64k",
                "read -P 0 2M 512k",
                "read -P 3 2560k 512",
                "read -P 0 4M 1M",
                "read -P 1 5M 1M",
                "read -P 0 6M 1M",
                "read -P 0 7M 512k",
                "read -P 1 7680k 512k",
                // Longest, and the last sector.
                "write -P 4 0 32M",
                "write -P 6 33553920 512",
                "read -P 6 33553920 512",
                "read -P 4 0 33553920",
            ],
        );
        // Several at once, overlapping nowhere.
        qemu_io(
            &uri,
            &[
                "aio_write -P 7 0 1M",
                "aio_write -P 8 1M 1M",
                "aio_write -z 2M 1M",
                "aio_write -P 9 3M 64k",
                "aio_flush",
                "aio_read -P 7 0 1M",
                "aio_read -P 8 1M 1M",
                "aio_read -P 0 2M 1M",
                "aio_flush",
                "read -P 9 3M 64k",
            ],
        );
        let disk = std::fs::read(&served.disk).unwrap();
        assert!(disk[..1 << 20].iter().all(|b| *b == 7));
        assert!(disk[2 << 20..3 << 20].iter().all(|b| *b == 0));
        assert!(disk[4 << 20..][..1 << 20].iter().all(|b| *b == 4));
    }
    served.stop();
}

#[test]
fn a_discard_gives_the_space_back() {
    let served = serve(16 * MIB);
    let allocated = || std::fs::metadata(&served.disk).unwrap().blocks() * 512;
    let uri = served.unix_uri();
    qemu_io(&uri, &["write -P 1 0 16M", "flush"]);
    let full = allocated();
    assert!(full >= 16 * MIB, "{full}");
    qemu_io(&uri, &["discard 0 8M", "flush"]);
    assert!(allocated() <= full - 7 * MIB, "{} of {full}", allocated());
    let map = nbdinfo(&["--map"], &uri);
    assert_eq!(map[0]["type"], 3, "{map}");
    served.stop();
}

#[test]
fn fio_verifies_what_it_wrote() {
    let served = serve(32 * MIB);
    for uri in served.uris() {
        let mut fio = tool("fio");
        fio.current_dir(served.folder.path());
        fio.args(["--name=v", "--ioengine=nbd", "--rw=randwrite"]);
        fio.args(["--bsrange=512-128k", "--blockalign=512", "--iodepth=32"]);
        fio.args(["--size=32M", "--verify=crc32c", "--verify_fatal=1"]);
        fio.args(["--do_verify=1", "--randseed=7", "--fsync=64"]);
        ok(fio.arg(format!("--uri={uri}")));
    }
    served.stop();
}

#[test]
fn fio_over_several_connections() {
    let served = serve(64 * MIB);
    for (uri, more) in served.uris().iter().zip(["--bs=4k", "--bs=64k"]) {
        let mut fio = tool("fio");
        fio.current_dir(served.folder.path());
        fio.args([
            "--name=m",
            "--ioengine=nbd",
            "--rw=randwrite",
            "--numjobs=4",
        ]);
        fio.args(["--size=16M", "--offset_increment=16M", "--iodepth=16"]);
        fio.args(["--verify=crc32c", "--verify_fatal=1", "--do_verify=1"]);
        fio.args(["--trim_percentage=0", "--fsync=100", "--group_reporting"]);
        ok(fio.arg(more).arg(format!("--uri={uri}")));
    }
    served.stop();
}
