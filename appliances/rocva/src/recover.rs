//! `recover`: the disks of a cut as files.
//!
//! The extent map comes first, from indexes alone; then each needed block is fetched once, in parallel,
//! and written where it belongs. Invariant: at most [`PARALLEL`] portions are in memory.

use crate::output::{PartialFile, check_free, write_whole};
use crate::plan::{Plan, choose};
use crate::progress::{Progress, Unit};
use crate::vmdk;
use anyhow::Context;
use futures::StreamExt;
use recovery_store::{Container, CutSelector, CutView, DiskInfo, StoreUrl};
use serde::Serialize;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;
use uuid::Uuid;

/// Portions fetched at once.
const PARALLEL: usize = 8;

/// The form of a recovered disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// The disk's bytes, sparse
    Raw,
    /// VMDK: a descriptor and a flat file
    VmdkFlat,
    /// VMDK: one compressed stream-optimised file, as in an OVA
    VmdkStream,
}

/// What to recover.
#[derive(Clone, Debug)]
pub struct RecoverRequest {
    /// The container.
    pub from: StoreUrl,
    /// The folder for the disks.
    pub out: PathBuf,
    /// Which cut.
    pub cut: CutSelector,
    /// Which disks, by name, VM/NAME or UUID; all if empty.
    pub disks: Vec<String>,
    /// In which form.
    pub format: Format,
    /// Whether files that are there are replaced.
    pub force: bool,
}

/// What was recovered.
#[derive(Clone, Debug, Serialize)]
pub struct RecoverReport {
    /// The domain.
    pub domain: Uuid,
    /// The cut.
    pub cut: u64,
    /// Its name.
    pub cut_name: Option<String>,
    /// When it was closed, ns since 1970.
    pub cut_time_ns: u64,
    /// The SHA-256 of its last part: it identifies cut and history.
    pub cut_sha256: String,
    /// The disks.
    pub disks: Vec<RecoveredDisk>,
    /// How long it took.
    pub seconds: f64,
}

/// One recovered disk.
#[derive(Clone, Debug, Serialize)]
pub struct RecoveredDisk {
    /// The disk.
    pub uuid: Uuid,
    /// Its name.
    pub name: String,
    /// Its VM's name.
    pub vm_name: String,
    /// Its last record in the cut.
    pub seq: u64,
    /// Its capacity.
    pub capacity_bytes: u64,
    /// Bytes that are not zeros or never written.
    pub data_bytes: u64,
    /// The file (of `vmdk-flat`: the descriptor).
    pub path: PathBuf,
    /// Its form.
    pub format: Format,
    /// Portions that an interrupted run had finished.
    pub resumed_portions: usize,
}

/// Recovers the disks of a cut.
pub async fn recover(
    request: &RecoverRequest,
    progress: &Progress,
) -> anyhow::Result<RecoverReport> {
    let started = Instant::now();
    let container = Arc::new(Container::open(&request.from).await?);
    let cut = container.select(&request.cut).await?;
    let chosen = choose(&cut, &request.disks)?;
    std::fs::create_dir_all(&request.out)
        .with_context(|| format!("creating the folder {}", request.out.display()))?;
    for (_, stem) in &chosen {
        for path in final_paths(&request.out, stem, request.format) {
            check_free(&path, request.force)?;
        }
    }
    let wanted: Vec<Uuid> = chosen.iter().map(|(disk, _)| disk.uuid).collect();
    let stage = progress.stage("reading indexes", 0, Unit::Objects);
    let view = container
        .view(&cut, Some(&wanted), |done, of| {
            stage.set(done as u64, of as u64);
        })
        .await?;
    stage.finish();
    let job = Job {
        container,
        view: Arc::new(view),
        request,
        progress,
    };
    let mut disks = Vec::new();
    for (disk, stem) in chosen {
        let recovered = job
            .disk(&disk, &stem)
            .await
            .with_context(|| format!("recovering disk {} of {}", disk.name, disk.vm_name))?;
        disks.push(recovered);
    }
    Ok(RecoverReport {
        domain: job.container.domain().uuid,
        cut: cut.cut,
        cut_name: cut.name,
        cut_time_ns: cut.time_ns,
        cut_sha256: job.view.sha256_hex(),
        disks,
        seconds: started.elapsed().as_secs_f64(),
    })
}

/// The files that a disk ends in; the last one makes it complete.
fn final_paths(out: &Path, stem: &str, format: Format) -> Vec<PathBuf> {
    match format {
        Format::Raw => vec![out.join(format!("{stem}.raw"))],
        Format::VmdkFlat => vec![
            out.join(format!("{stem}-flat.vmdk")),
            out.join(format!("{stem}.vmdk")),
        ],
        Format::VmdkStream => vec![out.join(format!("{stem}.vmdk"))],
    }
}

struct Job<'a> {
    container: Arc<Container>,
    view: Arc<CutView>,
    request: &'a RecoverRequest,
    progress: &'a Progress,
}

impl Job<'_> {
    async fn disk(&self, disk: &DiskInfo, stem: &str) -> anyhow::Result<RecoveredDisk> {
        let Self { view, request, .. } = self;
        let plan = Arc::new(Plan::new(view, disk.uuid)?);
        let key = format!(
            "jetdr-recovery 1 {} {} {} {} {}",
            view.sha256_hex(),
            disk.uuid,
            disk.capacity_bytes,
            plan.portions(),
            plan.data_bytes
        );
        let paths = final_paths(&request.out, stem, request.format);
        let (Some(first), Some(last)) = (paths.first(), paths.last()) else {
            anyhow::bail!("no file to write");
        };
        // VMDK counts in sectors.
        let len_bytes = match request.format {
            Format::Raw => disk.capacity_bytes,
            _ => disk.capacity_bytes.next_multiple_of(vmdk::SECTOR_BYTES),
        };
        let staged = match request.format {
            Format::VmdkStream => request.out.join(format!("{stem}.vmdk.raw")),
            _ => first.clone(),
        };
        let mut partial = PartialFile::open(&staged, &key, len_bytes)?;
        let resumed_portions = partial.resumed();
        self.fill(&mut partial, &plan, disk).await?;
        let id = vmdk::content_id(&view.sha256, disk.uuid);
        match request.format {
            Format::Raw => partial.finish(last, request.force)?,
            Format::VmdkFlat => {
                partial.finish(first, request.force)?;
                let flat_name = format!("{stem}-flat.vmdk");
                let text = vmdk::flat_descriptor(&flat_name, len_bytes, id);
                write_whole(last, text.as_bytes(), request.force)?;
            }
            Format::VmdkStream => {
                let stage = self.progress.stage("packing", plan.data_bytes, Unit::Bytes);
                self.pack(&partial, last, len_bytes, disk, id, &stage)?;
                stage.finish();
                partial.discard()?;
            }
        }
        let position = view.info.positions.iter().find(|p| p.disk == disk.uuid);
        Ok(RecoveredDisk {
            uuid: disk.uuid,
            name: disk.name.clone(),
            vm_name: disk.vm_name.clone(),
            seq: position.map_or(0, |position| position.seq),
            capacity_bytes: disk.capacity_bytes,
            data_bytes: plan.data_bytes,
            path: last.clone(),
            format: request.format,
            resumed_portions,
        })
    }

    /// Fetches the portions that are not there yet, in parallel, and writes them.
    async fn fill(
        &self,
        partial: &mut PartialFile,
        plan: &Arc<Plan>,
        disk: &DiskInfo,
    ) -> anyhow::Result<()> {
        let name = format!("{}/{}", disk.vm_name, disk.name);
        let stage = self.progress.stage(name, plan.data_bytes, Unit::Bytes);
        let missing: Vec<usize> = (0..plan.portions())
            .filter(|portion| {
                let there = partial.has(*portion);
                if there {
                    stage.add(portion_bytes(plan, *portion));
                }
                !there
            })
            .collect();
        let file = Arc::new(partial.file()?);
        let mut written = futures::stream::iter(missing)
            .map(|portion| {
                let task = Fetch {
                    container: self.container.clone(),
                    view: self.view.clone(),
                    plan: plan.clone(),
                    file: file.clone(),
                };
                async move { tokio::spawn(task.run(portion)).await? }
            })
            .buffer_unordered(PARALLEL);
        while let Some(portion) = written.next().await {
            let portion = match portion {
                Ok(portion) => portion,
                Err(error) => {
                    // The next run shall not fetch again what is there; this one's error counts more.
                    let _ = partial.remember();
                    return Err(error);
                }
            };
            stage.add(portion_bytes(plan, portion));
            partial.wrote(portion)?;
        }
        stage.finish();
        Ok(())
    }

    /// Makes a stream-optimised VMDK from the filled raw file.
    fn pack(
        &self,
        partial: &PartialFile,
        target: &Path,
        len_bytes: u64,
        disk: &DiskInfo,
        id: u32,
        stage: &crate::progress::Stage,
    ) -> anyhow::Result<()> {
        let map = self
            .view
            .extents(disk.uuid)
            .context("the disk is not in the view")?;
        let data = map.iter().filter_map(|piece| match piece.place {
            recovery_store::PartBlocks::Zero => None,
            _ => Some(piece.offset_bytes..piece.offset_bytes + piece.len_bytes),
        });
        let raw = partial.file()?;
        let name = target
            .file_name()
            .map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        let mut path = partial.path().as_os_str().to_owned();
        path.push(".packed");
        let path = PathBuf::from(path);
        let out = File::create(&path).with_context(|| format!("creating {}", path.display()))?;
        vmdk::write_stream(&raw, data, len_bytes, &name, id, &out, |bytes| {
            stage.add(bytes);
        })
        .with_context(|| format!("writing {}", path.display()))?;
        out.sync_all()
            .with_context(|| format!("syncing {}", path.display()))?;
        crate::output::publish(&path, target, self.request.force)
    }
}

fn portion_bytes(plan: &Plan, portion: usize) -> u64 {
    plan.portion(portion)
        .iter()
        .map(|piece| u64::from(piece.len_bytes))
        .sum()
}

/// One portion on its way from the container to the file.
struct Fetch {
    container: Arc<Container>,
    view: Arc<CutView>,
    plan: Arc<Plan>,
    file: Arc<File>,
}

impl Fetch {
    async fn run(self, portion: usize) -> anyhow::Result<usize> {
        let pieces = self.plan.portion(portion);
        let Some(first) = pieces.first() else {
            return Ok(portion);
        };
        let part = self
            .view
            .parts
            .get(first.part as usize)
            .context("the plan names a part that is not in the view")?;
        let mut wanted: Vec<u32> = pieces.iter().map(|piece| piece.block).collect();
        wanted.dedup();
        let blocks = self.container.read_part(part, &wanted).await?;
        tokio::task::spawn_blocking(move || self.write(portion, &blocks)).await??;
        Ok(portion)
    }

    fn write(&self, portion: usize, blocks: &[(u32, Vec<u8>)]) -> anyhow::Result<()> {
        let mut blocks = blocks.iter();
        let mut current = blocks.next();
        for piece in self.plan.portion(portion) {
            // Both are in the order of the blocks.
            while current.is_some_and(|(number, _)| *number < piece.block) {
                current = blocks.next();
            }
            let start = piece.at_bytes as usize;
            let bytes = current
                .and_then(|(_, raw)| raw.get(start..start + piece.len_bytes as usize))
                .context("a block is shorter than its extents say")?;
            self.file
                .write_all_at(bytes, piece.disk_offset_bytes)
                .with_context(|| format!("writing at byte {}", piece.disk_offset_bytes))?;
        }
        Ok(())
    }
}
