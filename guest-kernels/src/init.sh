#!/bin/sh
# The test guest's init. In: the kernel command line, whose unknown words the kernel hands over as environment.
#   run="COMMAND"  run COMMAND with sh in the background, its output on the console; its end is told as `run status=N`
#   shell=1        an interactive shell instead of ticks; leaving it powers the machine off
#   modules=A,B    load these modules too; the drivers of the machine's virtio devices are loaded unasked
#   before="COMMAND"  run COMMAND with sh to its end before the next
#   image=poweroff|return|stub  of an image kernel (vmm suspend-with): write /proc/vmcore to the disk `image`, and give the machine up
#   system=vda     mount that disk read-only and make it the root; programs of the initramfs are then in /run/bin
#   tools=vdb      mount that disk read-only on /mnt; Debian's programs in its directory tools are then on PATH
# Out: one line `ready kernel=R boot_id=U cpus=N`, then `tick N` about five times a second, and `input LINE` for each line
# typed on the console. Holds: it never ends, since the kernel panics when init does.

set_up() {
	export PATH=/tools/bin:/bin:/sbin HOME=/root
	mount -t proc proc /proc
	mount -t sysfs sysfs /sys
	mount -t devtmpfs devtmpfs /dev
	mount -t tmpfs tmpfs /tmp
	ip link set lo up
	hostname guest

	# Binds to the ACPI device QEMU0001 if the machine has one; a kernel's panic is then told through it.
	modprobe pvpanic_mmio

	# An absent device costs nothing: virtio_mmio is asked for if ACPI knows such a device, and then each device's own driver.
	if [ -e /sys/bus/acpi/devices/LNRO0005:00 ]; then
		modprobe virtio_mmio
		# shellcheck disable=SC2046 # One word for each device. What is built in, modprobe does not know.
		modprobe -qa $(cat /sys/bus/virtio/devices/*/modalias)
	fi
	if [ -n "$modules" ]; then
		# shellcheck disable=SC2046 # One word for each module.
		modprobe -a $(echo "$modules" | tr , ' ')
	fi
}

# The system is an ext4 image that is the same whatever the kernel: what belongs to the kernel goes along in memory, and this
# script goes on there as the first program.
enter_system() {
	modprobe -a nf_tables nft_ct inet_diag tcp_diag udp_diag unix_diag netlink_diag af_packet_diag
	mount -t ext4 -o ro "/dev/$system" /mnt
	mount -t tmpfs tmpfs /mnt/run
	mount -t tmpfs tmpfs /mnt/usr/lib/modules
	cp -a /lib/modules/. /mnt/usr/lib/modules/
	mkdir /mnt/run/bin
	# Those of busybox are links, and the system has its own.
	find /bin -type f ! -name busybox -exec cp {} /mnt/run/bin/ ';'
	cp /init /mnt/run/init
	umount /tmp
	mount -t tmpfs tmpfs /mnt/tmp
	for dir in dev proc sys; do
		mount --move "/$dir" "/mnt/$dir"
	done
	mkdir -p /mnt/dev/pts
	mount -t devpts devpts /mnt/dev/pts
	export in_system=1
	exec switch_root /mnt /run/init
}

if [ -n "$in_system" ]; then
	export PATH=/run/bin:/usr/sbin:/usr/bin
else
	set_up
	if [ -n "$system" ]; then
		enter_system
	fi
fi

if [ -n "$tools" ]; then
	mount -t ext4 -o ro "/dev/$tools" /mnt
fi

# The host's hand in this guest, if there is a way in. Its first line, or its end, is waited for.
if [ -e /dev/vsock ] && command -v vmm-agent >/dev/null; then
	mkfifo /run/vmm-agent
	vmm-agent </dev/null >/run/vmm-agent &
	read -r _ </run/vmm-agent
fi

echo "ready kernel=$(uname -r) boot_id=$(cat /proc/sys/kernel/random/boot_id) cpus=$(nproc)"

if [ -n "$before" ]; then
	sh -c "$before" </dev/null
fi

if [ -n "$image" ]; then
	vmm-image "$image"
fi

if [ -n "$run" ]; then
	(sh -c "$run" </dev/null; echo "run status=$?") &
fi

if [ "$shell" = 1 ]; then
	echo "busybox shell: leaving it powers off, \`vmm-exit N\` ends the machine with status N"
	cd /root
	setsid cttyhack sh
	poweroff -f
fi

while read -r line; do echo "input $line"; done </dev/console &

n=0
while :; do
	n=$((n + 1))
	echo "tick $n"
	sleep 0.2
done
