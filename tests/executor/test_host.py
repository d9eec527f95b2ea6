import pytest

from asyncllm.executor import host

MEMINFO = "MemTotal:       16000 kB\nMemFree:         100 kB\nMemAvailable:    8000 kB\n"


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "expected_kib"),
    [
        ({}, 8000),  # no cgroup
        ({"proc/self/cgroup": "0::/\n"}, 8000),  # one without a limit file, as at the root
        (
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": f"{5000 * 1024}\n",
                "sys/fs/cgroup/memory.current": f"{4000 * 1024}\n",
                "sys/fs/cgroup/memory.stat": f"anon 5\ninactive_file {1500 * 1024}\n",
            },
            2500,  # what is left, and page cache that can go
        ),
        (
            {
                "proc/self/cgroup": "0::/pod/box\n",
                "sys/fs/cgroup/pod/box/memory.max": "max\n",
                "sys/fs/cgroup/pod/box/memory.current": "0\n",
                "sys/fs/cgroup/pod/memory.max": f"{3000 * 1024}\n",
                "sys/fs/cgroup/pod/memory.current": f"{1000 * 1024}\n",
            },
            2000,  # a limit of the group around it
        ),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/x\n",
                "sys/fs/cgroup/memory/x/memory.limit_in_bytes": f"{700 * 1024}\n",
                "sys/fs/cgroup/memory/x/memory.usage_in_bytes": f"{200 * 1024}\n",
                "sys/fs/cgroup/memory/x/memory.stat": f"total_inactive_file {50 * 1024}\n",
            },
            550,  # cgroup version 1
        ),
        (
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": "1000\n",
                "sys/fs/cgroup/memory.current": "2000\n",
            },
            0,  # already over
        ),
    ],
)
def test_available_memory_is_what_machine_and_container_both_allow(tmp_path, files, expected_kib):
    root = write(tmp_path, {"proc/meminfo": MEMINFO, **files})
    assert host.available_memory_bytes(root) == expected_kib * 1024


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "10000 100000\n"}, 1),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
    ],
)
def test_cpu_quota_of_a_container_is_rounded_up(tmp_path, files, expected):
    assert host.cpu_quota(write(tmp_path, files)) == expected


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("model name\t: AMD EPYC\nflags\t\t: fpu avx512_bf16 avx2\n", True),
        ("model name\t: Intel Core\nflags\t\t: fpu avx2 avx512f\n", False),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("", False),
    ],
)
def test_bfloat16_is_read_from_the_processors_flags(tmp_path, cpuinfo, expected):
    root = write(tmp_path, {"proc/cpuinfo": cpuinfo})
    assert host.cpu_has_bfloat16(root) is expected


def test_flags_say_whose_processor_it_is(tmp_path):
    root = write(tmp_path, {"proc/cpuinfo": "vendor_id\t: GenuineIntel\nmodel name\t: Xeon\nflags\t\t: fpu avx2\n"})
    assert host.cpu_flags(root) == {"GenuineIntel", "fpu", "avx2"}
    assert host.cpu_name(root) == "Xeon"


def test_the_real_machine_can_be_read():
    assert host.available_memory_bytes() > 0
    assert host.cpu_quota() is None or host.cpu_quota() >= 1
    assert isinstance(host.cpu_name(), str)
