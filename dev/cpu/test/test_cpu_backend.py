"""The CPU backend does what CUDA does, and catches what it promises to catch.

Needs g++ and OpenBLAS; nvcc and MPI where they are there. Programs are built into $BUILD/dev_cpu (default: build).
"""
import concurrent.futures
import os
import re
import shutil
import subprocess

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
CPU = os.path.dirname(HERE)
ROOT = os.path.dirname(os.path.dirname(CPU))
OUT = os.path.join(ROOT, os.environ.get('BUILD', 'build'), 'dev_cpu')
PLANTED = ['missing_syncthreads', 'missing_syncwarp', 'past_the_end', 'unwritten_shared', 'divergent_barrier', 'float_atomics']
ORDERS = {name: dict(zip(('SIMT_ORDER', 'SIMT_SEED'), name.split()))
          for name in ['forward', 'reverse', 'priority 1', 'priority 2', 'priority 3', 'priority 4']}
in_every_order = pytest.mark.parametrize('order', ORDERS)

def run(command, **env):
    """The finished process, stdout and stderr together. Options of the backend come from the test alone."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith('SIMT_')}
    return subprocess.run(command, env={**clean, **env}, cwd=ROOT, text=True, errors='replace', timeout=300,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

def make_variable(name):
    makefile = f'include {CPU}/cpu.mk\nshow:\n\t@echo $({name})\n'
    return subprocess.run(['make', '-s', '-f', '-', 'show'], input=makefile, cwd=ROOT, text=True, check=True, stdout=subprocess.PIPE).stdout.split()

CXX, CXXFLAGS, SANFLAGS, LDLIBS, TRANSLATE = map(make_variable, ['CPU_CXX', 'CPU_CXXFLAGS', 'CPU_SANFLAGS', 'CPU_LDLIBS', 'CPU_TRANSLATE'])
CXXFLAGS += os.environ.get('CXXFLAGS', '').split()  # of make test CXXFLAGS=...

def translate(source, output):
    return run(TRANSLATE + [source, '-o', output])

def build(name, *flags, compiler=CXX):
    """Translate and compile HERE/name.cu; the path of the program. A warning from our headers is an error."""
    program = os.path.join(OUT, name + '_san' * ('-fno-sanitize-recover=all' in flags))
    os.makedirs(OUT, exist_ok=True)
    result = translate(os.path.join(HERE, name + '.cu'), program + '.cpp')
    assert result.returncode == 0, result.stdout
    result = run(compiler + CXXFLAGS + ['-Werror'] + list(flags) + [program + '.cpp', '-o', program] + LDLIBS)
    assert result.returncode == 0, result.stdout
    return program

# Everything is compiled at once, on two cores, before the first test that runs something.
BUILDS = {name: () for name in ['device_test', 'bf16_test', 'launch_test', 'matmul_test', 'ptx_test', 'streams_test', 'errors']}
BUILDS['planted'] = ('-O1',)
SAN_BUILDS = ['device_test', 'planted', 'streams_test', 'errors']
STREAMS = ['eager', 'late', 'random:1', 'random:2', 'random:3']

@pytest.fixture(scope='session')
def programs():
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        jobs = {name: pool.submit(build, name, *flags) for name, flags in BUILDS.items()}
        jobs.update({name + '_san': pool.submit(build, name, *SANFLAGS) for name in SAN_BUILDS})
        return {name: job.result() for name, job in jobs.items()}

# ---- what correct programs do -------------------------------------------------------------------------

@in_every_order
@pytest.mark.parametrize('name', ['device_test', 'ptx_test'])
def test_in_every_order(programs, name, order):
    for threads in ('1', '2'):
        result = run([programs[name]], OMP_NUM_THREADS=threads, **ORDERS[order])
        assert result.returncode == 0, result.stdout

@pytest.mark.parametrize('name', ['bf16_test', 'launch_test', 'matmul_test', 'device_test_san'])
def test_program(programs, name):
    result = run([programs[name]])
    assert result.returncode == 0, result.stdout

def test_matmul_has_the_same_bits_on_any_number_of_threads(programs):
    assert len({re.search('digest .*', run([programs['matmul_test']], OMP_NUM_THREADS=n).stdout)[0] for n in ('1', '2', '5')}) == 1

@pytest.mark.parametrize('streams', STREAMS)
@pytest.mark.parametrize('name', ['device_test', 'bf16_test', 'launch_test', 'matmul_test', 'ptx_test', 'streams_test', 'streams_test_san'])
def test_in_every_mode_of_streams(programs, name, streams):
    result = run([programs[name]], SIMT_STREAMS=streams)
    assert result.returncode == 0, result.stdout

# ---- the planted bugs ---------------------------------------------------------------------------------

def in_all_orders(programs, *arguments):
    return [run([programs['planted'], *arguments], **order) for order in ORDERS.values()]

@pytest.mark.parametrize('name', PLANTED)
def test_clean_twin_passes_in_every_order_and_with_sanitizers(programs, name):
    outputs = in_all_orders(programs, name) + [run([programs['planted_san'], name])]
    assert all(o.returncode == 0 and 'nan' not in o.stdout for o in outputs), outputs
    assert len({o.stdout for o in outputs}) == 1

@pytest.mark.parametrize('name', ['missing_syncthreads', 'missing_syncwarp', 'float_atomics'])
def test_results_differ_between_orders(programs, name):
    forward, reverse, *priority = [o.stdout for o in in_all_orders(programs, name, 'bug')]
    assert (forward == reverse) == (name == 'float_atomics')             # which a random order alone can tell
    assert any(o not in (forward, reverse) for o in priority)

def test_write_past_the_end_is_reported(programs):
    result = run([programs['planted'], 'past_the_end', 'bug'])
    assert result.returncode != 0
    assert re.search(r'simt error: write past the end of device memory: the 400 bytes from cudaMalloc at \S*expect\.h:\d+ were overrun, '
                     r'byte 400 was written\n.*scale_kernel', result.stdout), result.stdout
    result = run([programs['planted_san'], 'past_the_end', 'bug'])
    assert result.returncode != 0 and 'heap-buffer-overflow' in result.stdout
    assert re.search(rf"#0 .*planted\.cu:{line_of('planted', 'past_the_end')}\b", result.stdout), result.stdout

def test_unwritten_shared_memory_is_nan(programs):
    result = run([programs['planted'], 'unwritten_shared', 'bug'])
    assert result.stdout.count('nan') == 1
    # without the poison it would have gone unseen
    assert 'nan' not in run([programs['planted'], 'unwritten_shared', 'bug'], SIMT_POISON='0').stdout

@in_every_order
def test_divergent_barrier_is_reported(programs, order):
    result = run([programs['planted'], 'divergent_barrier', 'bug'], **ORDERS[order])
    assert result.returncode != 0
    assert 'simt error: divergent barrier' in result.stdout and 'exchange_kernel' in result.stdout
    assert all(f"planted.cu:{line_of('planted', barrier)}" in result.stdout for barrier in ('one_barrier', 'the_other')), result.stdout

@in_every_order
def test_missing_wait_for_an_asynchronous_copy_shows(programs, order):
    result = run([programs['ptx_test'], 'bug'], **ORDERS[order])
    assert result.returncode == 1 and ' 384 failed' in result.stdout, result.stdout      # all that is copied
    result = run([programs['ptx_test'], 'never', 'waits'], **ORDERS[order])
    assert result.returncode != 0 and 'nobody has waited for a copy of 16 bytes' in result.stdout, result.stdout

def in_all_streams(programs, *arguments, name='streams_test', modes=STREAMS):
    outputs = [run([programs[name], 'offload', *arguments], SIMT_STREAMS=streams) for streams in modes]
    assert all(o.returncode == 0 for o in outputs), outputs
    return [o.stdout for o in outputs]

@pytest.mark.parametrize('name', ['streams_test', 'streams_test_san'])
def test_streams_that_wait_have_the_same_results_whenever_they_run(programs, name):
    results = in_all_streams(programs, name=name)
    assert len(set(results)) == 1 and 'nan' not in results[0], results

# what a wait was for: before a kernel reads what was copied, a copy writes what a kernel reads, a kernel writes what a copy reads, the
# host writes what a copy reads, and the host reads what a copy writes
@pytest.mark.parametrize('mistake', ['copied', 'used', 'returned', 'staged', 'read'])
def test_missing_wait_of_a_stream_shows(programs, mistake):
    eager, late, *others = in_all_streams(programs, mistake, modes=['eager', 'late', *(f'random:{seed}' for seed in range(1, 9))])
    assert eager == in_all_streams(programs, modes=['eager'])[0]             # nobody would have noticed
    assert late != eager
    assert any(o != eager for o in others)

def test_example_of_the_readme(tmp_path):
    """Its kernel is the file's, its commands run as they stand there, and print what it says."""
    section = open(os.path.join(CPU, 'README.md')).read().split('## Finding a race in your own kernel')[1].split('\n## ')[0]
    blocks = [re.sub('^    ', '', b, flags=re.M) for b in re.findall(r'(?:^    .*\n)+', section, re.M)]
    source = open(os.path.join(HERE, 'differences.cu')).read()
    assert [b in source for b in blocks] == ['$ ' not in b for b in blocks]
    os.symlink(os.path.join(ROOT, 'dev'), tmp_path / 'dev')
    steps = re.findall(r'^\$ (.*\n)((?:[^$].*\n)*)', ''.join(b for b in blocks if '$ ' in b), re.M)
    assert len(steps) == 11
    for command, expected in steps:
        result = run(['bash', '-c', f'cd {tmp_path} && ' + command.replace('-lopenblas', ' '.join(LDLIBS))])
        assert result.stdout == expected, command
        assert (result.returncode != 0) == (' race' in command or ' overrun' in command)

# ---- errors that are named ----------------------------------------------------------------------------

def line_of(name, what):
    with open(os.path.join(HERE, name + '.cu')) as f:
        return next(i + 1 for i, line in enumerate(f) if line.rstrip().endswith('// at ' + what))

ERRORS = {
    'own_mask': r'simt error: lane \d+ calls __ballot_sync at \S*errors\.cu:{line} with mask 0x000001ff, which does not name it',
    'exited_lane': r'simt error: __shfl_sync at \S*errors\.cu:{line}: lane \d+ reads lane 0, which has exited',
    'outside_mask': r'simt error: __shfl_sync at \S*errors\.cu:{line}: lane \d+ reads lane 20, .*not in the mask',
    'different_collectives': r'simt error: lanes of one warp meet in different collectives: .*__shfl_down_sync',
    'deadlock': r'simt error: deadlock(.*\n)*.*waiting in __syncthreads at \S*errors\.cu:{line}',
    'trap': r'simt error: __trap\(\)\n.*thread \(5,0,0\)',
    'assert': r"errors\.cu:\d+: .*Assertion `t < 60' failed(.*\n)*.*wrong_kernel.*thread \(\d+,0,0\)",
    'shared_total': r"simt error: too much shared memory: with 'tile' \(\S*errors\.cu:\d+\) the block uses 53248 bytes, .*of 49152",
    'shared_overflow': r"simt error: write past the end of shared memory: 'tile' \(\S*errors\.cu:\d+\) has 128 bytes, and byte 128 was written",
    'before_start': r'simt error: write before the start of device memory: the 256 bytes .*byte -4 was written',
    'null_pointer': r'simt error: segmentation fault at address (0x|\(nil\)).*\n.*null_kernel.*thread \(\d+,0,0\)',
    'stack_overflow': r'simt error: stack overflow.*\n.*deep_kernel',
}

@pytest.mark.parametrize('order', list(ORDERS)[:3])
@pytest.mark.parametrize('name', ERRORS)
def test_error_is_named(programs, name, order):
    result = run([programs['errors'], name], **ORDERS[order])
    expected = ERRORS[name]
    if '{line}' in expected:
        expected = expected.replace('{line}', str(line_of('errors', name)))
    assert result.returncode != 0
    assert re.search(expected, result.stdout), result.stdout

@pytest.mark.parametrize('name,report', [('shared_overflow', 'out of bounds'), ('before_start', 'heap-buffer-overflow'), ('null_pointer', 'null pointer')])
def test_sanitizers_see_shared_and_device_memory(programs, name, report):
    result = run([programs['errors_san'], name])
    assert result.returncode != 0
    assert report in result.stdout and re.search(r'errors\.cu:\d+', result.stdout), result.stdout

REPORTS = {
    'past_the_end': r'b is done\nsimt error: write past the end of device memory: the 4 bytes .*byte 4 was written\n.*by cudaDeviceSynchronize; .*past_the_end_kernel',
    'null_pointer': r'b is done\nsimt error: segmentation fault at address (0x|\(nil\)).*\n.*set_kernel.*streams_test\.cu:{line}',
    'destroyed': r'simt: set_kernel at \S*streams_test\.cu:{line}: there is no such stream, or it is destroyed already \(cudaErrorInvalidResourceHandle\)',
    'deadlock': r'simt error: deadlock: no stream can go on\n'
                r'  the stream from \S*streams_test\.cu:\d+: cudaStreamWaitEvent at \S*streams_test\.cu:{line} waits for a record at nowhere:7\n'
                r'  the stream from \S*streams_test\.cu:\d+: cudaStreamWaitEvent at \S*streams_test\.cu:{second} waits for cudaEventRecord at ',
}

@pytest.mark.parametrize('name', REPORTS)
def test_error_of_a_late_stream_is_named(programs, name):
    result = run([programs['streams_test'], name], SIMT_STREAMS='late')
    expected = REPORTS[name]
    for what, of in (('{line}', name), ('{second}', 'second')):
        if what in expected:
            expected = expected.replace(what, str(line_of('streams_test', of)))
    assert result.returncode != 0 and 'nothing reported' not in result.stdout
    assert re.search(expected, result.stdout), result.stdout

@pytest.mark.parametrize('streams', STREAMS)
def test_what_is_left_at_the_end_is_done(programs, streams):
    result = run([programs['streams_test'], 'left'], SIMT_STREAMS=streams)
    assert result.returncode == 0 and sorted(result.stdout.splitlines()) == ['b is done', 'what was left: 1', 'what was left: 2'], result.stdout

# ---- options ------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name,value', [('SIMT_ORDER', 'backward'), ('SIMT_SEED', 'x'), ('SIMT_SEED', '-1'), ('SIMT_POISON', '2'), *(('SIMT_STREAMS', v) for v in ('', 'lazy', 'late:1', 'random', 'random:', 'random:x', 'random:-1', 'random:99999999999999999999')),
                                        ('SIMT_PROFILE', 'yes'),
                                        ('SIMT_REPORT', ''), ('SIMT_MEMORY', '1T'), ('SIMT_MEMORY', '99999999999G'), *(('OMP_NUM_THREADS', v) for v in ('0', '-1', '4abc', '', 'all'))])
def test_wrong_option_is_an_error_that_names_it(programs, name, value):
    result = run([programs['device_test']], **{name: value})
    assert result.returncode == 2
    assert f'simt error: {name}={value}: must be' in result.stdout

def test_memory_is_counted_and_limited(programs):
    result = run([programs['launch_test'], 'accounting'], SIMT_MEMORY='1M', SIMT_REPORT='1')
    assert result.returncode == 0, result.stdout
    assert 'simt: peak 1048576 bytes, now 0 bytes' in result.stdout

@pytest.mark.parametrize('limit', [20000, 50000, 100000, 150000, 200000, 300000, 400000, 600000, 2000000])
@pytest.mark.parametrize('name', ['matmul_test', 'device_test'])
def test_a_memory_limit_is_named_and_ends_the_program(programs, name, limit):
    """OpenBLAS asks for its buffers again and again, for ever; and a block of 1,024 threads has 132 MiB of stacks."""
    result = run(['bash', '-c', f'ulimit -v {limit}; exec {programs[name]}'], OMP_NUM_THREADS='2')
    assert result.returncode == 0 if limit == 2000000 else result.returncode in (0, 1), result.stdout
    assert result.returncode == 0 or re.search(rf'simt error: out of host memory: .*\(ulimit -v {limit}\)|cudaErrorMemoryAllocation', result.stdout), result.stdout
    assert result.returncode == 1 or name == 'device_test' or limit >= 300000

@pytest.mark.parametrize('limits,threads', [('ulimit -s 1000000; ulimit -v 2200000', '4'), ('true', '99999999999999999999'), ('true', '2,1'), ('ulimit -s 64', '2')])
def test_fewer_threads_and_odd_stacks_change_nothing(programs, limits, threads):
    result = run(['bash', '-c', f'{limits}; exec {programs["matmul_test"]}'], OMP_NUM_THREADS=threads)
    assert result.returncode == 0, result.stdout
    assert ('of 4 threads could be started' in result.stdout) == (threads == '4'), result.stdout

def test_a_stack_that_is_too_small_is_named(programs):
    result = run(['bash', '-c', f'ulimit -s 32; exec {programs["device_test"]}'])
    assert result.returncode == 1 and 'simt error: the limit on a stack is 32 KiB (ulimit -s)' in result.stdout

def test_profile_names_kernels_and_matmuls(programs):
    output = run([programs['device_test']], SIMT_PROFILE='1').stdout
    assert re.search(r'\d+\.\d+ +\d+\.\d% +1 +96 +\d+ +96 +0  collective_kernel', output), output
    assert '[matmul]' in run([programs['matmul_test']], SIMT_PROFILE='1').stdout

# ---- the preprocessor ---------------------------------------------------------------------------------

def translated(tmp_path, text, name='x.cu'):
    (tmp_path / name).write_text(text)
    result = translate(str(tmp_path / name), str(tmp_path / 'x.cpp'))
    return result, (tmp_path / 'x.cpp').read_text() if result.returncode == 0 else ''

@pytest.mark.parametrize('text,message', [
    ('void f() {\n  int a = 1 <<< 2;\n}', r'x\.cu:2: error: .*<<<'),
    ('void f() {\n\n  k<<<1, 2>> >();\n}', r'x\.cu:3: error: a <<< without its >>>'),
    ('void f() { k<<<1, 2>>>; }', r'x\.cu:1: error: a launch needs its arguments'),
    ('void f() { k<<<>>>(); }', r'x\.cu:1: error: an empty <<<>>>'),
    ('void f() { x = 1 + k<<<1, 2>>>(); }', r'x\.cu:1: error: .*stands before'),
    ('void f() { k<<<1, (2>>>(); }', r"x\.cu:1: error: .*(closed|close)"),
    ('#define LAUNCH(k) k<<<1, \\\n 2>>>()\n', r'x\.cu:1: error: .*inside a macro'),
    ('#define BUFFER __shared__ float b[2];', r'x\.cu:1: error: .*inside a macro'),
    ('void f() {\n  __shared__ float s[2] = {1, 2};\n}', r'x\.cu:2: error: .*cannot be initialised'),
    ('void f() { __shared__ float s[]; }', r'x\.cu:1: error: .*has no size'),
    ('void f() { __shared__ float (*s)[4]; }', r'x\.cu:1: error: .*no form of __shared__'),
    ('void f() { __shared__ s; }', r'x\.cu:1: error: .*__shared__'),
    ('void f() { extern __shared__ float s[4]; }', r'x\.cu:1: error: .*without a size'),
    ('void f(__shared__ float* s) {}', r"x\.cu:1: error: __shared__ after '\('"),
])
def test_unknown_form_is_an_error_with_its_line(tmp_path, text, message):
    result, _ = translated(tmp_path, text)
    assert result.returncode == 1
    assert re.search(message, result.stdout), result.stdout
    assert not (tmp_path / 'x.cpp').exists()

def test_what_is_no_form_is_left_alone(tmp_path):
    text = ('// k<<<1, 2>>>(); and __shared__ in a comment\n/* <<< */\nconst char* s = "<<<__shared__" R"(k<<<1, 2>>>())" R"x(")" <<<)x";\n'
            "char c = '\"', d = '\\''; int n = 1'000'000 << 2 >> 1; auto f = a<b<c<int>>>(); int x = 0x1'ff;\n#error don't <<<\n")
    result, output = translated(tmp_path, text)
    assert result.returncode == 0, result.stdout
    assert output == f'#include <cuda_runtime.h>\n#line 1 "{tmp_path}/x.cu"\n' + text

def test_lines_are_kept(tmp_path):
    (tmp_path / 'sub').mkdir()
    (tmp_path / 'sub' / 'y.cu').write_text('#pragma once\n__global__ void y() {\n  __shared__ float a[2],\n    b[3];\n  a[0] = b[0] = 1;\n}\nint in_y = __LINE__;')
    text = ('#include "sub/y.cu"\n#include "sub/y.cu"\n#include <stdio.h>\nint here = __LINE__;\nvoid f() {\n  y<<<1,\n     2,\n     0>>>(\n  );\n  int there = __LINE__;\n'
            '  printf("%d %d %d %s\\n", in_y, here, there, __FILE__);\n}\nint main() { f(); }\n')
    result, output = translated(tmp_path, text)
    assert result.returncode == 0, result.stdout
    result = run(CXX + CXXFLAGS + ['-Werror', str(tmp_path / 'x.cpp'), '-o', str(tmp_path / 'x')])
    assert result.returncode == 0, result.stdout
    assert run([str(tmp_path / 'x')]).stdout == f'7 4 10 {tmp_path}/x.cu\n'
    # and a compiler's complaint is about the source
    (tmp_path / 'sub' / 'y.cu').write_text('\nnamespace a {\n__shared__ float s[2];\n}\nextern __shared__ float t[];\n')
    translated(tmp_path, '#include "sub/y.cu"\n')
    assert re.findall(r'sub/y\.cu:(\d+):\d+: error: .must_be_in_a_function. .*does not name a type',
                      run(CXX + CXXFLAGS + ['-fsyntax-only', str(tmp_path / 'x.cpp')]).stdout) == ['3', '5']

# ---- the tests are CUDA; NCCL -------------------------------------------------------------------------

NVCC = shutil.which('nvcc') or next((p for p in ['/usr/local/cuda/bin/nvcc'] if os.path.exists(p)), None)

@pytest.mark.skipif(not NVCC, reason='nvcc is not installed (CUDA Toolkit)')
@pytest.mark.parametrize('name', ['device_test', 'matmul_test', 'streams_test'])
def test_nvcc_accepts_it_without_a_warning(name):
    os.makedirs(OUT, exist_ok=True)
    result = run([NVCC, '-std=c++17', '-arch=sm_80', '-c', os.path.join(HERE, name + '.cu'), '-o', os.path.join(OUT, name + '.o')])
    assert result.returncode == 0 and result.stdout == '', result.stdout

needs_mpi = pytest.mark.skipif(not (shutil.which('mpicxx') and shutil.which('mpirun')), reason='mpicxx or mpirun is not installed (Debian: libopenmpi-dev openmpi-bin)')

@pytest.fixture(scope='session')
def nccl():
    program = build('nccl_test', compiler=['env', f'OMPI_CXX={CXX[0]}', f'MPICH_CXX={CXX[0]}', 'mpicxx'])
    allow = {'OMPI_ALLOW_RUN_AS_ROOT': '1', 'OMPI_ALLOW_RUN_AS_ROOT_CONFIRM': '1', 'OMPI_MCA_rmaps_base_oversubscribe': '1'}
    return lambda *arguments, streams='eager': run(['mpirun', '-np', '2', program, *arguments], SIMT_STREAMS=streams, **allow)

@needs_mpi
@pytest.mark.parametrize('streams', STREAMS)
def test_nccl_between_two_processes(nccl, streams):
    result = nccl(streams=streams)
    assert result.returncode == 0 and result.stdout.count(' 0 failed') == 2, result.stdout

@needs_mpi
@pytest.mark.parametrize('mistake,calls', [
    ('order', ('rank 0 calls ncclAllReduce number 0 of 100 float', 'rank 1 calls ncclAllReduce number 0 of 100 float in communicator 1')),
    ('count', ('rank 0 calls ncclAllReduce number 0 of 3000000 float', 'rank 1 calls ncclAllReduce number 0 of 2999999 float')),
    ('kind', ('rank 0 calls ncclAllReduce [^\n]*', 'rank 1 calls ncclAllGather [^\n]*'))])
@pytest.mark.parametrize('streams', ['eager', 'late'])
def test_ranks_that_disagree_are_an_error(nccl, mistake, calls, streams):
    result = nccl(mistake, streams=streams)
    assert result.returncode != 0 and 'nothing reported' not in result.stdout
    # each rank says it, itself first; mpirun may cut one's line by the other's
    assert re.search('simt error: ranks disagree about a collective: ({0}, {1}|{1}, {0})'.format(*calls), result.stdout), result.stdout
