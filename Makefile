# One line per target. `make` alone tells what there is.
#
#   make demo                    stock kernels are booted, take turns, are kept in files, and go on in other processes
#   make test                    every test: this machine's KVM with our own guests, the lab with Linux; of the long ones a sample
#   make torture                 all of what `make test` has a sample of: 1,000 rounds of restore and snapshot; every crash point, power cut
#                                and flipped bit; power cuts of a real file system; rounds of Linux under load (docs/torture.md)
#   make fuzz                    hostile snapshots, chains and archives for the reader, 10 million each unless RUNS says otherwise; needs g++
#   make check                   format, lints, documentation, unit tests
#   make bench                   restores beside what KVM alone costs, on this machine's KVM; switches, the restore stub, and disks and networks
#                                beside QEMU's, snapshots beside its migration to a file, in the lab
#   make lab RUN='vmm doctor'    a shell command in a machine with a real /dev/kvm; without RUN a shell
#     HOST=6.1|6.12|7.2          the lab's own kernel: 6.12 unless given, 6.1 with LANE=intel
#     LANE=amd|intel             its processor
#     KVM_ARGS='npt=0'|'ept=0'   parameters for kvm_amd or kvm_intel
#     EXTRA=dir                  its files are at /extra
#     LIMIT=seconds              540 unless given
#
# make itself ends with status 2 when a target fails, and says which status it was. A script that needs the status calls
# what `make lab` calls: cargo run -q --release -p vmm-tests --bin lab -- 'shell command'

.PHONY: help setup demo test torture fuzz unit bench lab check lint
.SILENT:

# The command reaches the lab as it was typed: make must not expand its dollar signs.
override RUN := $(value RUN)
export RUN HOST LANE KVM_ARGS EXTRA LIMIT

help:
	sed -n '/^$$/q;s/^# \{0,1\}//p' Makefile

# What the targets below need of the machine.
setup:
	./setup.sh

lab: setup
	cargo run -q --release -p vmm-tests --bin lab

demo: setup
	cargo build --release -p vmm -p guest-kernels -p vmm-tests --bins
	cargo run -q --release -p vmm-tests --bin demo

# Here: 1,000 rounds of each of our own guests; crash points, power cuts and flipped bits, many more of them than in `make test`.
# In the lab: power cuts of ext4 on a device that notes each write.
# 100 rounds of restore and snapshot in the lab, with one vCPU and with two; 50 with a database on a disk, for each kernel.
# For each kernel: pauses, twins, networks, snapshots of a guest that runs on and chains of them, sockets and the agent, clones,
# a minute between snapshot and restore, the oracle with every device, disks that hang, clocks that are set, dumps.
# Kernels that take turns, or are put under live processes; processes that go to another machine.
torture: setup
	cargo build --release -p vmm -p vmm-tests --bins
	cargo test --release -p snapshot -p snapshot-format
	VMM_TORTURE=1 cargo test --release -p vmm-tests --test durability --test bad_snapshots --test forged --test lost_ram --test archives --test seals -- --nocapture
	target/x86_64-unknown-linux-gnu/release/stories rounds-1000
	mkdir -p target/torture
	cp target/x86_64-unknown-linux-gnu/release/stories target/torture/
	LIMIT=1500 EXTRA=target/torture cargo run -q --release -p vmm-tests --bin lab -- '/extra/stories power-cuts'
	LIMIT=3000 EXTRA=target/torture cargo run -q --release -p vmm-tests --bin lab -- '/extra/stories 6.12/rounds-100-cpus-1 6.12/rounds-100-cpus-2'
	LIMIT=5000 EXTRA=target/torture cargo run -q --release -p vmm-tests --bin lab -- '/extra/stories 6.1/disk-commits-50 6.12/disk-commits-50 7.2/disk-commits-50'
	LIMIT=3000 EXTRA=target/torture cargo run -q --release -p vmm-tests --bin lab -- '/extra/stories $(foreach v,6.1 6.12 7.2,$(v)/time-2 $(v)/twins-2 $(v)/network $(v)/live $(v)/chain $(v)/tracked-3)'
	LIMIT=1500 EXTRA=target/torture cargo run -q --release -p vmm-tests --bin lab -- '/extra/stories $(foreach v,6.1 6.12 7.2,$(v)/agent $(v)/sockets $(v)/socket-clones $(v)/oracle-vsock)'
	LIMIT=1500 EXTRA=target/torture cargo run -q --release -p vmm-tests --bin lab -- '/extra/stories $(foreach v,6.1 6.12 7.2,$(v)/oracle-every-device $(v)/disk-hangs $(v)/small-devices)'
	LIMIT=1500 EXTRA=target/torture cargo run -q --release -p vmm-tests --bin lab -- '/extra/stories $(foreach v,6.1 6.12 7.2,$(v)/network-minute $(v)/clones $(v)/rtc $(v)/clock-by-agent $(v)/clock-without-agent)'
	LIMIT=1500 EXTRA=target/torture cargo run -q --release -p vmm-tests --bin lab -- '/extra/stories $(foreach v,6.1 6.12 7.2,$(v)/dump $(v)/panic-dump $(v)/panic-dump-without-driver)'
	LIMIT=3000 EXTRA=target/torture cargo run -q --release -p vmm-tests --bin lab -- '/extra/stories upgrade upgrade-or-not carried renamed moved moved-on moved-back not-moved switch switch-files $(foreach v,6.1 6.12 7.2,$(v)/suspended-poweroff $(v)/suspended-return $(v)/suspended-stub $(v)/suspended-ends $(v)/vmcore-rate)'
	LIMIT=3000 EXTRA=target/torture cargo run -q --release -p vmm-tests --bin lab -- '/extra/stories upgrade-20 upgrade-fails upgrade-or-reboot'
	LANE=intel LIMIT=5000 EXTRA=target/torture cargo run -q --release -p vmm-tests --bin lab -- '/extra/stories switch 6.1/suspended-poweroff 6.1/suspended-stub 6.12/suspended-ends 6.1/vmcore-rate'

# Coverage counters in all that the targets call, which needs no other compiler; findings are in target/fuzz/.
RUNS ?= 10000000
COUNTERS := -Cpasses=sancov-module $(addprefix -Cllvm-args=-sanitizer-coverage-,level=4 inline-8bit-counters pc-table trace-compares)
fuzz: setup
	command -v g++ >/dev/null || { echo 'make fuzz: there is no g++, which libFuzzer is built with' >&2; exit 1; }
	cd tests/fuzz && CARGO_TARGET_DIR=../../target/fuzz/build cargo run -q --release --bin seeds -- ../../target/fuzz
	cd tests/fuzz && RUSTFLAGS='$(COUNTERS)' CARGO_TARGET_DIR=../../target/fuzz/build-counted cargo build -q --release --bin file --bin chain --bin archive
	cd target/fuzz && for name in file chain archive; do \
		build-counted/*/release/$$name -runs=$(RUNS) -max_len=60000 -artifact_prefix=$$name- -print_final_stats=1 $$name || exit 1; \
	done

bench: setup
	cargo build --release -p vmm -p guest-kernels -p vmm-tests --bins
	cargo run -q --release -p vmm-tests --bin bench
	mkdir -p target/switches
	cp target/x86_64-unknown-linux-gnu/release/stories target/switches/
	LIMIT=900 EXTRA=target/switches cargo run -q --release -p vmm-tests --bin lab -- '/extra/stories switch-cost 6.1/suspended-return 6.1/vmcore-rate 6.12/stub-rate'
	LANE=intel LIMIT=1500 EXTRA=target/switches cargo run -q --release -p vmm-tests --bin lab -- '/extra/stories 6.1/stub-rate'
	cargo run -q --release -p vmm-tests --bin device_bench

check: lint unit

# What no test sees: format, lints, documentation.
lint: setup
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --workspace --no-deps

# What needs no machine: all but the end-to-end tests.
unit: setup
	cargo test --workspace --exclude vmm-tests --tests
	cargo test -p vmm-tests --lib --bins

# The tests find vmm beside themselves.
test: unit
	cargo build --release -p vmm -p vmm-tests --bins
	cargo test --release -p vmm-tests --test '*'
