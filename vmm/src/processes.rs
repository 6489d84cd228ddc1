//! One tree of a guest's processes as a file, independent of the guest's kernel.
//!
//! In: a process number and a name for the file, or such a file. Out: the file, or the processes in another guest. Holds: the file
//! appears whole or not at all, and a file that is not whole never reaches a guest; processes that are to end do so only when the
//! file is there, and go on if it can't be.

use crate::checkpointer::{self, KEPT, PROGRAM};
use crate::cli::{CheckpointArgs, GuestAddress, RestoreProcessArgs};
use crate::complaint::printable;
use crate::exec::{self, ExecError};
use crate::process_file::{self, Unfit, Writer};
use crate::tail::Tail;
use agent::{Client, ClientError, Streams};
use snapshot::publish::{NewFile, PublishError};
use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::time::Duration;

/// How long the guest's agent may take to answer; a busy guest is slow.
const PATIENCE: Duration = Duration::from_secs(30);

/// Why processes were not carried.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// The guest can't be asked.
    #[error(transparent)]
    Exec(#[from] ExecError),
    /// It lacks the program.
    #[error("the guest has no {PROGRAM}")]
    NoProgram,
    /// The guest has said why not.
    #[error("the guest says: {0}")]
    Guest(String),
    /// The new file.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// The new file, before it has its name.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Unfit,
    },
    /// The file that is to be read.
    #[error("cannot restore from {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Unfit,
    },
    /// All is done but the last.
    #[error("{} is written, but process {pid} still stands where it was", path.display())]
    NotEnded {
        /// The file.
        path: PathBuf,
        /// The first process.
        pid: u32,
        /// Why.
        source: Box<ProcessError>,
    },
}

/// Writes a process of the guest and all below it to a file. They run on, unless they are to end.
///
/// # Errors
/// See [`ProcessError`]; unless it is [`ProcessError::NotEnded`] they run on and there is no new file, or one whose directory can't
/// be synced.
pub fn checkpoint(args: &CheckpointArgs) -> Result<(), ProcessError> {
    let new = NewFile::create(&args.file)?;
    let pid = args.pid.to_string();
    let written = export(args, &pid, new.file()).and_then(|()| Ok(new.publish()?));
    if !args.end {
        return written;
    }
    let quietly = |verb| ask(&args.guest, &[verb, &pid], Box::new(io::empty()), &mut io::sink());
    if written.is_err() {
        // If the guest has said why, they go on already.
        let _ = quietly("continue");
        return written;
    }
    let not_ended =
        |error| ProcessError::NotEnded { path: args.file.clone(), pid: args.pid, source: Box::new(error) };
    quietly("end").map_err(not_ended)
}

/// With `--end` the processes stand still afterwards.
fn export(args: &CheckpointArgs, pid: &str, file: &std::fs::File) -> Result<(), ProcessError> {
    let failed = |source| ProcessError::Write { path: args.file.clone(), source };
    let mut writer = Writer::new(file);
    let words: &[&str] = if args.end { &["export", "--stop", pid] } else { &["export", pid] };
    let exported = ask(&args.guest, words, Box::new(io::empty()), &mut writer);
    match exported {
        Err(ProcessError::Exec(ExecError::Agent(ClientError::Output(source)))) => Err(failed(source.into())),
        Err(error) => Err(error),
        Ok(()) => writer.finish().map_err(failed),
    }
}

/// Has the processes in a file go on in this guest, and returns the number of the first of them.
///
/// # Errors
/// See [`ProcessError`].
pub fn restore(args: &RestoreProcessArgs) -> Result<String, ProcessError> {
    let unfit = |source| ProcessError::Read { path: args.file.clone(), source };
    let file = process_file::open(&args.file).map_err(unfit)?;
    let mut said = Tail::of(KEPT);
    ask(&args.guest, &["import"], Box::new(file), &mut said)?;
    let line = said.last_line().unwrap_or_default();
    Ok(printable(line.trim_start_matches("pid=")))
}

/// Runs the program in the guest; what it complains of is the error.
fn ask(
    guest: &GuestAddress,
    words: &[&str],
    stdin: Box<dyn Read + Send>,
    stdout: &mut dyn Write,
) -> Result<(), ProcessError> {
    let client = Client::new(&exec::vsock(guest)?, PATIENCE);
    let command: Vec<OsString> = [&[PROGRAM], words].concat().into_iter().map(OsString::from).collect();
    let mut complaint = Tail::of(KEPT);
    let ended = match client.exec(&command, Streams { stdin, stdout, stderr: &mut complaint }) {
        Err(error) if checkpointer::is_missing(&error) => return Err(ProcessError::NoProgram),
        ended => ended.map_err(ExecError::from)?,
    };
    let Some(line) = checkpointer::failure(ended, &complaint) else { return Ok(()) };
    let prefix = format!("{PROGRAM}: ");
    Err(ProcessError::Guest(printable(line.strip_prefix(&prefix).unwrap_or(&line))))
}
