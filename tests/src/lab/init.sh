#!/bin/sh
# The lab's first program.
#
# In: /lab/settings, and /lab/run unless the session is interactive. Out: the command's output on the channel, then the
# token and the status; signs of life meanwhile, each a line with the token alone. Holds: nothing else is written to the
# channel; complaints go to the console, which is the log.

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm /dev/net
mount -t devpts devpts /dev/pts
mount -t tmpfs -o size=90%,mode=1777 tmpfs /dev/shm
mount -t tmpfs -o size=90%,mode=1777 tmpfs /tmp
ip link set lo up
hostname lab
# Opening one of these has the kernel load its module.
mknod /dev/net/tun c 10 200
mknod /dev/loop-control c 10 237
mknod /dev/vhost-vsock c 10 241
# A guest's RAM is promised whole and touched in part.
echo 1 > /proc/sys/vm/overcommit_memory

{
    read -r channel
    read -r kernels
    read -r modules
    read -r kvm
    read -r token
    read -r rows columns
} < /lab/settings

# What a kernel has built in is not in modules.dep.
cd "/lib/modules/$(uname -r)" || exit 1
for module in $modules; do
    if grep -q "^$module.ko:" modules.dep; then
        modprobe "$module"
    fi
done
# shellcheck disable=SC2086 # The module's parameters are words of their own.
modprobe $kvm

# Waits for a device that its driver makes in its own time: at most 10 seconds.
wait_for() {
    n=0
    until [ -e "$1" ]; do
        n=$((n + 1))
        [ $n -gt 200 ] && echo "lab: no $1" && return 1
        sleep 0.05
    done
}
# Without these there is no lab, and the caller sees this log.
wait_for /dev/kvm || exit 1
wait_for "$channel" || exit 1
wait_for "$kernels" || exit 1
mount -t ext4 -o ro "$kernels" /lab/kernels || exit 1

# The same disk under one name on both lanes: a guest finds Debian's tools on it.
ln -s "$kernels" /lab/disk
export HOME=/root PATH=/tools/bin:/bin:/sbin TERM="${TERM:-linux}"
cd /tmp || exit 1
exec 3<>"$channel"
# A serial port starts at 9600 baud; no other kind of channel minds.
stty 115200 <&3 2>/dev/null
signs_of_life() {
    while :; do
        printf '%s\n' "$token" >&3
        sleep 20
    done
}
if [ -e /lab/run ]; then
    stty raw <&3 2>/dev/null
    signs_of_life &
    setsid sh -c '. /lab/profile; . /lab/run' </dev/null >&3 2>&1 3<&-
    status=$?
else
    stty rows "$rows" cols "$columns" <&3
    signs_of_life &
    export PS1='lab:\w# ' ENV=/lab/profile
    setsid -c sh <"$channel" >"$channel" 2>&1 3<&-
    status=$?
    # The end of its session hung up the terminal under everyone.
    exec 3<>"$channel"
fi
printf '%s%d\n' "$token" "$status" >&3

# The caller ends the machine when it has read that.
while :; do
    sleep 1000
done
