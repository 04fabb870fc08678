# Second program of the virtual machine: kernel file systems, modules, then the work, whose exit code it leaves behind.
export HOME=@HOME@ PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export WARREN_VM_RESULTS=@RESULTS@ CARGO_MANIFEST_DIR=@ROOT@
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
for name in fd:/proc/self/fd stdin:fd/0 stdout:fd/1 stderr:fd/2; do
    ln -s "${name#*:}" "/dev/${name%%:*}"
done
mount -t tmpfs -o mode=755 run /run
mount -t tmpfs -o size=60%,mode=1777 tmp /tmp
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf -o mode=700 bpf /sys/fs/bpf
mount -t tracefs tracefs /sys/kernel/tracing
# Programs look for modules where the kernel's own package puts them.
mkdir -p "/lib/modules/$(uname -r)"
mount --bind @MODULES@ "/lib/modules/$(uname -r)"
hostname warren-vm
ip link set lo up
stty -F /dev/ttyS1 raw
cd @ROOT@
bash @RESULTS@/work.sh </dev/null >/dev/ttyS1 2>&1
echo $? >@RESULTS@/exit-code
sync
stty -F /dev/ttyS1 sane
echo o >/proc/sysrq-trigger
exec sleep 60
