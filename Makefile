# One line per target. `make` alone tells what there is.
#
#   make lab RUN='vmm doctor'    a shell command in a machine with a real /dev/kvm; without RUN a shell
#     HOST=6.1|6.12|7.2          the lab's own kernel: 6.12 unless given, 6.1 with LANE=intel
#     LANE=amd|intel             its processor
#     KVM_ARGS='npt=0'|'ept=0'   parameters for kvm_amd or kvm_intel
#     EXTRA=dir                  its files are at /extra
#     LIMIT=seconds              540 unless given
#
# make itself ends with status 2 when a target fails, and says which status it was. A script that needs the status calls
# what `make lab` calls: cargo run -q --release -p vmm-tests --bin lab -- 'shell command'

.PHONY: help setup lab check
.SILENT:

# The command reaches the lab as it was typed: make must not expand its dollar signs.
override RUN := $(value RUN)
export RUN HOST LANE KVM_ARGS EXTRA LIMIT

help:
	sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

# What the targets below need of the machine.
setup:
	./setup.sh

lab: setup
	cargo run -q --release -p vmm-tests --bin lab

check: setup
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --workspace --no-deps
	cargo test --workspace --lib --bins
