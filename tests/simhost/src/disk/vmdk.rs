//! Monolithic flat VMDK: the descriptor, and its one flat extent.
//!
//! Invariant: lines that are not understood (`ddb.*` of others) are kept as they are.

use super::{DiskError, FlatFile, io_error as io};
use std::io::Write;
use std::path::{Path, PathBuf};

const MAX_DESCRIPTOR_BYTES: u64 = 64 * 1024;
const SECTOR_BYTES: u64 = 512;

fn refuse(path: &Path, why: impl Into<String>) -> DiskError {
    DiskError::Descriptor {
        path: path.to_owned(),
        why: why.into(),
    }
}

/// The flat extent that a descriptor's text names: its file and its length in sectors.
pub fn flat_extent(text: &str) -> Result<(String, u64), String> {
    if !text.trim_start().starts_with("# Disk DescriptorFile") {
        return Err("not a VMDK descriptor: it does not begin with `# Disk DescriptorFile`".into());
    }
    let mut found = None;
    for line in text.lines() {
        let mut words = line.split_whitespace();
        if words.next() != Some("RW") {
            continue;
        }
        let sectors = words.next().and_then(|n| n.parse::<u64>().ok());
        let sectors = sectors.ok_or(format!("extent line `{line}` has no length"))?;
        let kind = words.next().unwrap_or_default();
        if kind != "FLAT" && kind != "VMFS" {
            return Err(format!(
                "extent of kind `{kind}`: only flat extents can be opened"
            ));
        }
        let name = line
            .split('"')
            .nth(1)
            .ok_or(format!("extent line `{line}` has no file name"))?;
        let offset = line.splitn(3, '"').nth(2).unwrap_or_default().trim();
        if !offset.is_empty() && offset != "0" {
            return Err(format!(
                "the disk begins at sector `{offset}` of `{name}`: only extents from sector 0 of \
                 their file can be opened"
            ));
        }
        if name.is_empty() || name.contains('/') {
            return Err(format!("extent file `{name}` is not beside the descriptor"));
        }
        if found.replace((name.to_string(), sectors)).is_some() {
            return Err("more than one extent: only monolithic disks can be opened".into());
        }
    }
    found.ok_or("no extent line (`RW <sectors> FLAT \"<file>\" 0`)".into())
}

/// Opens a disk by its descriptor.
pub fn open(path: &Path) -> Result<FlatFile, DiskError> {
    let len = std::fs::metadata(path).map_err(io("open", path))?.len();
    if len > MAX_DESCRIPTOR_BYTES {
        let why =
            format!("{len} bytes is too long for a descriptor; a sparse VMDK cannot be opened");
        return Err(refuse(path, why));
    }
    let bytes = std::fs::read(path).map_err(io("read", path))?;
    let text = std::str::from_utf8(&bytes).map_err(|_| refuse(path, "not a text descriptor"))?;
    let (name, sectors) = flat_extent(text).map_err(|why| refuse(path, why))?;
    let disk = FlatFile::open(&path.with_file_name(&name))?;
    if disk.capacity_bytes() != sectors.saturating_mul(SECTOR_BYTES) {
        let why = format!(
            "the descriptor says {sectors} sectors, {name} has {} bytes",
            disk.capacity_bytes()
        );
        return Err(refuse(path, why));
    }
    Ok(disk)
}

/// The path of a descriptor's flat extent.
pub fn flat_path(path: &Path) -> PathBuf {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{stem}-flat.vmdk"))
}

/// Makes a disk of zeros; refuses to replace a descriptor or a flat extent.
pub fn create(path: &Path, capacity_bytes: u64) -> Result<FlatFile, DiskError> {
    create_as(path, capacity_bytes, uuid::Uuid::new_v4().into_bytes())
}

/// The same with a uuid that was chosen before.
pub fn create_as(path: &Path, capacity_bytes: u64, uuid: [u8; 16]) -> Result<FlatFile, DiskError> {
    let flat = flat_path(path);
    let name = flat.file_name().unwrap_or_default().to_string_lossy();
    let sectors = capacity_bytes / SECTOR_BYTES;
    let cylinders = (sectors / (255 * 63)).clamp(1, 65535);
    let text = format!(
        "# Disk DescriptorFile\nversion=1\nCID={NEW_CID:08x}\nparentCID=ffffffff\n\
         createType=\"monolithicFlat\"\n\n# Extent description\nRW {sectors} FLAT \"{name}\" 0\n\n\
         # The Disk Data Base\nddb.adapterType = \"lsilogic\"\nddb.virtualHWVersion = \"14\"\n\
         ddb.geometry.cylinders = \"{cylinders}\"\nddb.geometry.heads = \"255\"\n\
         ddb.geometry.sectors = \"63\"\nddb.uuid = \"{}\"\n",
        uuid_text(&uuid)
    );
    // The descriptor first: if one is there nothing has been touched.
    let mut descriptor = std::fs::File::create_new(path).map_err(io("make", path))?;
    let made = descriptor
        .write_all(text.as_bytes())
        .map_err(io("write", path))
        .and_then(|()| FlatFile::create(&flat, capacity_bytes));
    if made.is_err() {
        let _ = std::fs::remove_file(path);
    }
    made
}

/// The content id of a disk that was never opened for writing.
const NEW_CID: u32 = 0xffff_fffe;
/// What `parentCID` says where there is no parent.
const NO_CID: u32 = 0xffff_ffff;

/// As `ddb.uuid` is written: pairs of digits, a dash in the middle.
fn uuid_text(uuid: &[u8; 16]) -> String {
    let pairs = |half: &[u8]| {
        let pairs: Vec<String> = half.iter().map(|byte| format!("{byte:02x}")).collect();
        pairs.join(" ")
    };
    let (one, two) = uuid.split_at(8);
    format!("{}-{}", pairs(one), pairs(two))
}

fn parse_uuid(text: &str) -> Option<[u8; 16]> {
    let digits: String = text.chars().filter(|c| !" -\"".contains(*c)).collect();
    let number = u128::from_str_radix(&digits, 16).ok();
    number
        .filter(|number| digits.len() == 32 && *number != 0)
        .map(u128::to_be_bytes)
}

/// The content id and the uuid of a descriptor; a uuid that cannot be read is none.
pub fn ids(path: &Path) -> Result<(u32, Option<[u8; 16]>), DiskError> {
    let text = std::fs::read_to_string(path).map_err(io("read", path))?;
    let value_of = |key: &str| {
        let mut pairs = text.lines().filter_map(|line| line.split_once('='));
        pairs.find(|(k, _)| k.trim() == key).map(|(_, v)| v.trim())
    };
    let cid = match value_of("CID").map(|text| u32::from_str_radix(text, 16)) {
        Some(Ok(cid)) => cid,
        Some(Err(_)) => return Err(refuse(path, "its `CID` is not a hexadecimal number")),
        None => NEW_CID,
    };
    Ok((cid, value_of("ddb.uuid").and_then(parse_uuid)))
}

/// Another content id than this.
pub fn next_content_id(cid: u32) -> u32 {
    loop {
        let next = uuid::Uuid::new_v4().as_u128() as u32;
        if ![0, cid, NEW_CID, NO_CID].contains(&next) {
            return next;
        }
    }
}

/// Sets the content id, and the uuid if there is one to set; durable when it returns.
pub fn set_ids(path: &Path, cid: u32, uuid: Option<[u8; 16]>) -> Result<(), DiskError> {
    let text = std::fs::read_to_string(path).map_err(io("read", path))?;
    let is_key = |line: &str, key: &str| line.split('=').next().is_some_and(|k| k.trim() == key);
    let mut lines: Vec<String> = text
        .lines()
        .filter(|line| uuid.is_none() || !is_key(line, "ddb.uuid"))
        .map(String::from)
        .collect();
    match lines.iter_mut().find(|line| is_key(line, "CID")) {
        Some(line) => *line = format!("CID={cid:08x}"),
        // Behind the line that makes it a descriptor.
        None => lines.insert(1.min(lines.len()), format!("CID={cid:08x}")),
    }
    lines.extend(uuid.map(|uuid| format!("ddb.uuid = \"{}\"", uuid_text(&uuid))));
    rewrite(path, &lines)
}

/// The disk has grown: its extent line says so. Durable when it returns.
pub fn set_capacity(path: &Path, capacity_bytes: u64) -> Result<(), DiskError> {
    let text = std::fs::read_to_string(path).map_err(io("read", path))?;
    let sectors = capacity_bytes / SECTOR_BYTES;
    let lines: Vec<String> = text
        .lines()
        .map(|line| {
            let mut words = line.splitn(3, ' ');
            match (words.next(), words.next(), words.next()) {
                (Some("RW"), Some(_), Some(rest)) => format!("RW {sectors} {rest}"),
                _ => line.to_string(),
            }
        })
        .collect();
    rewrite(path, &lines)
}

fn rewrite(path: &Path, lines: &[String]) -> Result<(), DiskError> {
    let text = lines.join("\n") + "\n";
    super::identity::replace(path, text.as_bytes()).map_err(io("rewrite", path))
}

/// Sets a `ddb.` line of a descriptor, or removes it; all other lines stay. Durable when it returns.
pub fn set_line(path: &Path, key: &str, value: Option<&str>) -> Result<(), DiskError> {
    // Either would end the line, or the value in it, and begin something else.
    let breaks_out = |text: &str| text.contains(|c: char| c.is_control() || c == '"');
    if breaks_out(key) || key.contains('=') || value.is_some_and(breaks_out) {
        let why = format!(
            "{key:?} cannot be set to {value:?}: a line of a descriptor holds no line break and \
             no quotation mark"
        );
        return Err(refuse(path, why));
    }
    let text = std::fs::read_to_string(path).map_err(io("read", path))?;
    let is_key = |line: &str| line.split('=').next().is_some_and(|k| k.trim() == key);
    let mut lines: Vec<String> = text
        .lines()
        .filter(|line| !is_key(line))
        .map(String::from)
        .collect();
    if let Some(value) = value {
        lines.push(format!("{key} = \"{value}\""));
    }
    rewrite(path, &lines)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn round_trip_and_foreign_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.vmdk");
        create(&path, 1 << 20).unwrap().write_at(b"x", 512).unwrap();
        set_line(&path, "ddb.iofilters", Some("jetdr")).unwrap();
        set_line(&path, "ddb.iofilters", Some("jetdr,other")).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.matches("ddb.iofilters").count(), 1);
        assert!(text.contains("ddb.adapterType"));
        assert_eq!(open(&path).unwrap().capacity_bytes(), 1 << 20);
        set_line(&path, "ddb.iofilters", None).unwrap();
        assert!(
            !std::fs::read_to_string(&path)
                .unwrap()
                .contains("iofilters")
        );
    }

    #[test]
    fn nothing_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.vmdk");
        std::fs::write(&path, "a descriptor of somebody").unwrap();
        let error = create(&path, 1 << 20).unwrap_err().to_string();
        assert!(error.contains("d.vmdk"), "{error}");
        let there = std::fs::read_to_string(&path).unwrap();
        assert_eq!(there, "a descriptor of somebody");
        assert!(!flat_path(&path).exists(), "half a disk is left");
        std::fs::remove_file(&path).unwrap();
        std::fs::write(flat_path(&path), "data").unwrap();
        create(&path, 1 << 20).unwrap_err();
        assert_eq!(std::fs::read_to_string(flat_path(&path)).unwrap(), "data");
        assert!(!path.exists(), "half a disk is left");
    }

    #[test]
    fn a_value_cannot_bring_lines_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.vmdk");
        create(&path, 1 << 20).unwrap();
        let before = std::fs::read_to_string(&path).unwrap();
        for (key, value) in [
            ("ddb.x", "y\"\nRW 8 FLAT \"etc\" 0"),
            ("ddb.x", "y\r"),
            ("ddb.x", "\""),
            ("ddb.x\nRW", "y"),
            ("a=b", "y"),
        ] {
            let error = set_line(&path, key, Some(value)).unwrap_err().to_string();
            assert!(error.contains("line break"), "{error}");
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), before);
    }

    #[test]
    fn bad_descriptors_say_why() {
        let head = "# Disk DescriptorFile\n";
        for (text, why) in [
            ("hello", "does not begin"),
            (head, "no extent line"),
            ("# Disk DescriptorFile\nRW x FLAT \"a\" 0", "no length"),
            ("# Disk DescriptorFile\nRW 8 SPARSE \"a\"", "only flat"),
            ("# Disk DescriptorFile\nRW 8 FLAT \"../a\" 0", "not beside"),
            ("# Disk DescriptorFile\nRW 8 FLAT \"a\" 128", "sector `128`"),
            ("# Disk DescriptorFile\nRW 8 FLAT \"a\" x", "sector `x`"),
            (
                "# Disk DescriptorFile\nRW 8 FLAT \"a\" 0\nRW 8 FLAT \"b\" 0",
                "more than one",
            ),
        ] {
            let error = flat_extent(text).unwrap_err();
            assert!(error.contains(why), "{text:?}: {error}");
        }
    }
}
