//! The guests that stories are told with: our own on any KVM, stock Linux where it runs.
//!
//! In: a name. Out: the arguments of `vmm run`, and the line by which the guest shows that it lives. Holds: a story needs
//! to know nothing else of its guest, so the same stories run with all of them.

use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};

/// The stock kernels.
pub const LINUX: [&str; 3] = ["6.1", "6.12", "7.2"];

/// A guest to be booted.
#[derive(Clone, Debug)]
pub struct Guest {
    /// For messages.
    pub name: String,
    kernel: PathBuf,
    initrd: Option<PathBuf>,
    cmdline: String,
    memory: String,
    cpus: u32,
    entry: &'static str,
    arguments: Vec<String>,
    /// What stands before the number that goes up for as long as the guest lives.
    pub pulse: &'static str,
    /// What the guest says when it has looked for losses and found none.
    pub proof: &'static str,
}

impl Guest {
    /// One of our own; its file is written to `dir`.
    ///
    /// # Errors
    /// There is no such guest, or the file can't be written.
    pub fn bare(name: &str, dir: &Path) -> Result<Self> {
        let (_, bytes) = guest_kernels::bare::all()
            .iter()
            .find(|(known, _)| *known == name)
            .with_context(|| format!("no bare-metal guest is called {name}"))?;
        let kernel = dir.join(name);
        std::fs::write(&kernel, bytes).with_context(|| format!("cannot write {}", kernel.display()))?;
        let pulse = match name {
            "counter" => "tick ",
            "dirty" => "written=",
            _ => "round=",
        };
        let (name, cmdline) = (name.to_owned(), String::new());
        Ok(Self {
            name,
            kernel,
            initrd: None,
            cmdline,
            memory: "128M".to_owned(),
            cpus: 1,
            entry: "auto",
            arguments: Vec::new(),
            pulse,
            proof: pulse,
        })
    }

    /// A stock kernel from the lab's `/guests`, as an uncompressed vmlinux. `run` is a shell command for its init.
    pub fn linux(version: &str, run: &str) -> Self {
        let dir = Path::new("/guests").join(version);
        let run = if run.is_empty() { String::new() } else { format!(" run=\"{run}\"") };
        Self {
            name: format!("Linux {version}"),
            kernel: dir.join("vmlinux"),
            initrd: Some(dir.join("initrd")),
            cmdline: format!("console=ttyS0 panic=-1 quiet{run}"),
            memory: "512M".to_owned(),
            cpus: 1,
            entry: "auto",
            arguments: Vec::new(),
            pulse: "tick ",
            proof: "tick ",
        }
    }

    /// With this image in place of vmlinux, beside it: `vmlinuz`.
    pub fn image(mut self, file: &str) -> Self {
        self.kernel.set_file_name(file);
        self
    }

    /// With these files in place of those in `/guests`.
    pub fn files(mut self, kernel: PathBuf, initrd: PathBuf) -> Self {
        (self.kernel, self.initrd) = (kernel, Some(initrd));
        self
    }

    /// The file that it is booted from.
    pub fn kernel(&self) -> &Path {
        &self.kernel
    }

    /// With these words on its command line as well.
    pub fn cmdline(mut self, words: &str) -> Self {
        self.cmdline = format!("{} {words}", self.cmdline).trim().to_owned();
        self
    }

    /// With an option of `vmm run`.
    pub fn argument(mut self, option: &str, value: &str) -> Self {
        self.arguments.extend([option.to_owned(), value.to_owned()]);
        self
    }

    /// With this switch of `vmm run`.
    pub fn switch(mut self, name: &str) -> Self {
        self.arguments.push(name.to_owned());
        self
    }

    /// Entered by this protocol: `linux` or `pvh`.
    pub fn entry(mut self, protocol: &'static str) -> Self {
        self.entry = protocol;
        self
    }

    /// With this much memory.
    pub fn memory(mut self, size: &str) -> Self {
        size.clone_into(&mut self.memory);
        self
    }

    /// With this many vCPUs.
    pub fn cpus(mut self, count: u32) -> Self {
        self.cpus = count;
        self
    }

    /// With another sign of life, which is a proof as well.
    pub fn pulse(mut self, pulse: &'static str) -> Self {
        (self.pulse, self.proof) = (pulse, pulse);
        self
    }

    /// With another proof.
    pub fn proof(mut self, proof: &'static str) -> Self {
        self.proof = proof;
        self
    }

    /// The arguments of `vmm` that boot it.
    pub fn run_args(&self) -> Vec<String> {
        let path = |path: &Path| path.display().to_string();
        let mut args = vec!["run".to_owned(), "--kernel".to_owned(), path(&self.kernel)];
        args.extend(self.initrd.iter().flat_map(|initrd| ["--initrd".to_owned(), path(initrd)]));
        args.extend(["--entry".to_owned(), self.entry.to_owned()]);
        args.extend(["--memory".to_owned(), self.memory.clone()]);
        args.extend(["--cpus".to_owned(), self.cpus.to_string()]);
        args.extend(["--cmdline".to_owned(), self.cmdline.clone()]);
        args.extend(["--name".to_owned(), self.word()]);
        args.extend(self.arguments.iter().cloned());
        args
    }

    /// Which Linux it is: `6.1`.
    pub fn version(&self) -> &str {
        self.name.rsplit(' ').next().unwrap_or_default()
    }

    /// Its name as a word.
    pub fn word(&self) -> String {
        self.name.replace(' ', "-")
    }

    /// The arguments of `vmm switch` that boot it beside others.
    pub fn switch_args(&self) -> Vec<String> {
        let path = |path: &Path| path.display().to_string();
        let mut args = vec!["--kernel".to_owned(), path(&self.kernel)];
        args.extend(self.initrd.iter().flat_map(|initrd| ["--initrd".to_owned(), path(initrd)]));
        args.extend([
            "--memory".to_owned(),
            self.memory.clone(),
            "--cmdline".to_owned(),
            self.cmdline.clone(),
        ]);
        args.extend(["--cpus".to_owned(), self.cpus.to_string(), "--as".to_owned(), self.word()]);
        args
    }

    /// The number in a line that has the guest's pulse.
    ///
    /// # Errors
    /// The line has none.
    pub fn beat(&self, line: &str) -> Result<u64> {
        let rest = line.split(self.pulse).nth(1).unwrap_or_default();
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        ensure!(!digits.is_empty(), "{}: no number after \"{}\" in \"{line}\"", self.name, self.pulse);
        Ok(digits.parse()?)
    }
}
