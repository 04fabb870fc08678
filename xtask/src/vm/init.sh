#!/bin/busybox sh
# First program of the virtual machine: makes a root out of the machine's files that swallows what is written.
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
fail() {
    echo "vm: $1" >/dev/console
    poweroff -f
}
while read -r module; do
    insmod "/modules/$module" || fail "module $module cannot be loaded"
done </modules.order
read -r results </results
mount -t virtiofs rootfs /machine || fail "the machine's files cannot be mounted"
mount -t tmpfs -o size=80%,mode=755 memory /memory || fail "no memory"
mkdir /memory/upper /memory/work
mount -t overlay -o lowerdir=/machine,upperdir=/memory/upper,workdir=/memory/work root /root ||
    fail "no overlay"
mount --bind "/machine$results" "/root$results" || fail "the directory of results cannot be mounted"
umount /proc
mount --move /dev /root/dev
exec switch_root /root /bin/bash "$results/stage.sh"
