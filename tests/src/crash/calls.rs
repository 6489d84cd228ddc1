//! The system calls that change files, on x86-64.
//!
//! In: a thread's registers. Out: what its call changed, with the bytes as they are in the file afterwards. Holds: a call that
//! changes a file of the directory in a way that is not known here is an error, not a gap.

use anyhow::{Context, Result, bail};
use libc::{pid_t, user_regs_struct};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// What a call did.
#[derive(Clone, Debug)]
pub struct Done {
    /// The system call's name.
    pub name: &'static str,
    /// None if it failed.
    pub change: Option<Change>,
}

/// A change of a directory or of a file in it. Files are known by their inodes.
#[derive(Clone, Debug)]
pub enum Change {
    /// A new file, with a name or, by O_TMPFILE, without one.
    Created {
        /// Its inode.
        inode: u64,
        /// Its name.
        path: Option<PathBuf>,
    },
    /// Bytes were written.
    Written {
        /// The file.
        inode: u64,
        /// Where in it.
        offset: u64,
        /// What.
        bytes: Vec<u8>,
    },
    /// The file is this long now.
    Resized {
        /// The file.
        inode: u64,
        /// In bytes.
        len: u64,
    },
    /// Its bytes are on the disk.
    Synced {
        /// The file.
        inode: u64,
    },
    /// The directory is on the disk.
    DirectorySynced,
    /// A file has another name.
    Renamed {
        /// The name it had.
        from: PathBuf,
        /// The name it has, which may have been another file's.
        to: PathBuf,
    },
    /// A file has one more name.
    Linked {
        /// The file.
        inode: u64,
        /// The name.
        to: PathBuf,
    },
    /// A name is gone.
    Removed {
        /// The name.
        path: PathBuf,
    },
    /// Nothing that a power cut could undo and anyone would miss: permissions, times.
    Attributes,
}

/// A call that a thread has begun.
pub(super) struct Seen {
    /// The system call's number.
    pub(super) number: i64,
    name: &'static str,
    args: [u64; 6],
    /// The file, or the first path.
    path: PathBuf,
    /// The second path.
    to: PathBuf,
    /// Where a write without an offset begins.
    position: u64,
}

/// Names of the calls that matter, whether their first argument is a descriptor of the file that is changed, and which arguments
/// are paths.
const CALLS: &[(i64, &str, Target)] = &[
    (libc::SYS_open, "open", Target::Paths(&[0])),
    (libc::SYS_openat, "openat", Target::Paths(&[1])),
    (libc::SYS_write, "write", Target::Descriptor),
    (libc::SYS_pwrite64, "pwrite64", Target::Descriptor),
    (libc::SYS_writev, "writev", Target::Descriptor),
    (libc::SYS_pwritev, "pwritev", Target::Descriptor),
    (libc::SYS_ftruncate, "ftruncate", Target::Descriptor),
    (libc::SYS_fallocate, "fallocate", Target::Descriptor),
    (libc::SYS_copy_file_range, "copy_file_range", Target::Destination),
    (libc::SYS_fsync, "fsync", Target::Descriptor),
    (libc::SYS_fdatasync, "fdatasync", Target::Descriptor),
    (libc::SYS_fchmod, "fchmod", Target::Descriptor),
    (libc::SYS_utimensat, "utimensat", Target::Descriptor),
    (libc::SYS_rename, "rename", Target::Paths(&[0, 1])),
    (libc::SYS_renameat, "renameat", Target::Paths(&[1, 3])),
    (libc::SYS_renameat2, "renameat2", Target::Paths(&[1, 3])),
    (libc::SYS_linkat, "linkat", Target::Paths(&[3, 1])),
    (libc::SYS_unlink, "unlink", Target::Paths(&[0])),
    (libc::SYS_unlinkat, "unlinkat", Target::Paths(&[1])),
];

#[derive(Clone, Copy)]
enum Target {
    /// The first argument is a descriptor.
    Descriptor,
    /// The third is.
    Destination,
    /// These are paths; the first of them is looked at.
    Paths(&'static [usize]),
}

/// The call that a thread of the process begins, if it changes something in `dir`, or syncs it.
pub(super) fn of(process: pid_t, regs: &user_regs_struct, dir: &Path) -> Option<Seen> {
    let number = regs.orig_rax as i64;
    let &(_, name, target) = CALLS.iter().find(|(known, ..)| *known == number)?;
    let args = [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9];
    let (path, to) = match target {
        Target::Descriptor => (opened(process, args[0])?, PathBuf::new()),
        Target::Destination => (opened(process, args[2])?, PathBuf::new()),
        Target::Paths(places) => {
            let second = places.get(1).and_then(|&place| text(process, args[place]));
            (text(process, args[places[0]])?, second.unwrap_or_default())
        }
    };
    let only_opens = open_flags(number, &args).is_some_and(|flags| flags & MAKES == 0);
    let position = if number == libc::SYS_write { position(process, args[0]).unwrap_or(0) } else { 0 };
    (path.starts_with(dir) && !only_opens).then_some(Seen { number, name, args, path, to, position })
}

/// Flags of open(2) with which there may be a file, or the end of one, that wasn't.
const MAKES: i32 = libc::O_CREAT | libc::O_TRUNC | (libc::O_TMPFILE & !libc::O_DIRECTORY);

fn open_flags(number: i64, args: &[u64; 6]) -> Option<i32> {
    match number {
        libc::SYS_open => Some(args[1] as i32),
        libc::SYS_openat => Some(args[2] as i32),
        _ => None,
    }
}

impl Seen {
    /// Whether its third argument is a length of bytes to be written.
    pub(super) fn writes(&self) -> bool {
        [libc::SYS_write, libc::SYS_pwrite64].contains(&self.number) && self.args[2] > 1
    }

    /// What it did, now that it has returned.
    pub(super) fn done(self, process: pid_t, result: i64) -> Result<Done> {
        let change = if result < 0 { None } else { Some(self.change(process, result as u64)?) };
        Ok(Done { name: self.name, change })
    }

    fn change(&self, process: pid_t, result: u64) -> Result<Change> {
        Ok(match self.number {
            libc::SYS_open | libc::SYS_openat => self.created(process, result)?,
            libc::SYS_write => self.written(process, self.position, result)?,
            libc::SYS_pwrite64 => self.written(process, self.args[3], result)?,
            libc::SYS_ftruncate => {
                Change::Resized { inode: inode(process, self.args[0])?, len: self.args[1] }
            }
            libc::SYS_fsync | libc::SYS_fdatasync => self.synced(process)?,
            libc::SYS_fchmod | libc::SYS_utimensat => Change::Attributes,
            libc::SYS_rename | libc::SYS_renameat | libc::SYS_renameat2 => {
                Change::Renamed { from: self.path.clone(), to: self.to.clone() }
            }
            libc::SYS_linkat => {
                let inode = fs::symlink_metadata(&self.path).context("a new link")?.ino();
                Change::Linked { inode, to: self.path.clone() }
            }
            libc::SYS_unlink | libc::SYS_unlinkat => Change::Removed { path: self.path.clone() },
            _ => bail!("{} of {} is not understood", self.name, self.path.display()),
        })
    }

    fn created(&self, process: pid_t, descriptor: u64) -> Result<Change> {
        let flags = open_flags(self.number, &self.args).context("a call that opens nothing")?;
        let nameless = flags & libc::O_TMPFILE == libc::O_TMPFILE;
        let path = (!nameless).then(|| self.path.clone());
        Ok(Change::Created { inode: inode(process, descriptor)?, path })
    }

    /// The bytes are read from the file, which nobody else writes.
    fn written(&self, process: pid_t, offset: u64, len: u64) -> Result<Change> {
        let mut bytes = vec![0; len as usize];
        File::open(link(process, self.args[0]))?.read_exact_at(&mut bytes, offset)?;
        Ok(Change::Written { inode: inode(process, self.args[0])?, offset, bytes })
    }

    fn synced(&self, process: pid_t) -> Result<Change> {
        let is_dir = fs::metadata(link(process, self.args[0]))?.is_dir();
        Ok(if is_dir {
            Change::DirectorySynced
        } else {
            Change::Synced { inode: inode(process, self.args[0])? }
        })
    }
}

fn link(process: pid_t, descriptor: u64) -> PathBuf {
    format!("/proc/{process}/fd/{descriptor}").into()
}

fn inode(process: pid_t, descriptor: u64) -> Result<u64> {
    Ok(fs::metadata(link(process, descriptor)).context("an open file")?.ino())
}

/// Where the file of a descriptor is.
fn opened(process: pid_t, descriptor: u64) -> Option<PathBuf> {
    fs::read_link(link(process, descriptor)).ok()
}

fn position(process: pid_t, descriptor: u64) -> Option<u64> {
    let info = fs::read_to_string(format!("/proc/{process}/fdinfo/{descriptor}")).ok()?;
    info.lines().find_map(|line| line.strip_prefix("pos:"))?.trim().parse().ok()
}

/// A text in the process's memory.
fn text(process: pid_t, address: u64) -> Option<PathBuf> {
    let memory = File::open(format!("/proc/{process}/mem")).ok()?;
    let mut bytes = vec![0; libc::PATH_MAX as usize];
    let len = read_some(&memory, &mut bytes, address).ok()?;
    let end = bytes[..len].iter().position(|&byte| byte == 0)?;
    Some(PathBuf::from(OsStr::from_bytes(&bytes[..end])))
}

/// As much as there is: the text may be at the end of what is mapped.
fn read_some(memory: &File, bytes: &mut [u8], address: u64) -> io::Result<usize> {
    let page = 4096 - (address % 4096) as usize;
    let first = page.min(bytes.len());
    memory.read_exact_at(&mut bytes[..first], address)?;
    let rest = memory.read_at(&mut bytes[first..], address + first as u64);
    Ok(first + rest.unwrap_or(0))
}
