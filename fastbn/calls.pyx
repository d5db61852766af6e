# cython: boundscheck=False, wraparound=False, cdivision=True
"""One call of the kernels: its constants, its arrays, and what is done with them.

Design: the one place that chooses the view, allocates and calls the kernels. Every function reads as: check everything (arguments.pyx),
run the kernels without the GIL, and only then change what the caller holds (running averages). An array whose memory is
some transpose of a C-contiguous one is worked on as it lies, through the view (M, C, S); anything else is copied once.
"""
import operator

import numpy as np

cimport cython
cimport numpy as cnp
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.math cimport NAN
from libc.stdint cimport uintptr_t
from libc.string cimport memcmp, memcpy, memset

from fastbn.arguments cimport (
    activation_of,
    as_array,
    checked_eps,
    checked_out,
    dense,
    feature_axis,
    floating,
    identical,
    load,
    new_doubles,
    overlap,
    shape_of,
    store,
    usable_as,
    writable,
)
from fastbn.batchstats cimport BatchStats, average_part, new_stats
from fastbn.kernels cimport machine, memory
from fastbn.kernels.cut cimport NARROW_LANES
from fastbn.kernels.job cimport Activation, Job, Kernel, Table
from fastbn.kernels.rounding cimport Control, as_before, ieee
from fastbn.kernels.types cimport LINE_BYTES
from fastbn.renorm cimport correct_gradients, correct_parameters, corrections

from fastbn import kernels

cnp.import_array()

cdef enum:
    SHORT = 16384        # elements read; below, giving the GIL away costs more than it gives others
    FEW_VALUES = 4096    # of each feature; above, what is done once for each does not weigh

cdef Table *KERNELS = <Table *>PyCapsule_GetPointer(kernels.table, "fastbn.kernels.Table")


cdef class Prepared


cdef object settled(object a, str name):
    """a as an array, before any address is taken: turning it into one may run code of its own, which might resize x."""
    return a if a is None or cnp.PyArray_Check(a) else floating(a, name)


cdef class Constants:
    """What is the same in every call of a layer, checked and in C types: a short call spends most of its time on arguments.

    features: the expected number, or -1.  weight, bias, mean, var: (C,) or None; a training forward updates the running averages mean
    and var in place, which then must be contiguous float64.  renorm: None, or (r_max, d_max), which needs mean and var.  lasting: a layer's,
    whose arrays stay the same ones, contiguous, and whose inference is called again and again.
    """
    cdef Py_ssize_t features
    cdef object weight
    cdef object bias
    cdef double eps
    cdef readonly object mean
    cdef readonly object var
    cdef bint unbiased
    cdef readonly object axis
    cdef Activation activation
    cdef int num_threads
    cdef public tuple renorm
    cdef bint lasting
    cdef Prepared prepared

    def __init__(self, features=-1, weight=None, bias=None, eps=1e-5, *, mean=None, var=None, unbiased=True, axis=1, activation=None,
                 num_threads=None, renorm=None, lasting=False):
        self.features = features
        self.weight = settled(weight, "weight")
        self.bias = settled(bias, "bias")
        self.eps = checked_eps(eps)
        self.mean = settled(mean, "running_mean")
        self.var = settled(var, "running_var")
        self.unbiased = unbiased
        self.axis = operator.index(axis)
        self.activation = activation_of(activation)
        self.num_threads = 0 if num_threads is None else machine.checked_threads(num_threads)
        self.renorm = renorm
        self.lasting = lasting

    def like(self, mean, var, axis):
        """The same with other averages and another feature axis."""
        cdef Constants other = Constants.__new__(Constants)
        other.features = self.features
        other.weight = self.weight
        other.bias = self.bias
        other.eps = self.eps
        other.mean = mean
        other.var = var
        other.unbiased = self.unbiased
        other.axis = axis
        other.activation = self.activation
        other.num_threads = self.num_threads
        other.renorm = self.renorm
        return other


@cython.freelist(8)
cdef class Call:
    """The arrays of one call and the job made of them. All arguments are checked before anything is computed."""
    cdef Job job
    cdef cnp.ndarray x          # as the kernels read it: dense
    cdef cnp.ndarray dy
    cdef cnp.ndarray y          # as the kernels write it: laid out as x
    cdef object out             # what the caller gets
    cdef bint fresh             # out is a new array
    cdef bint inplace           # out is the input itself
    cdef bint x_kept            # whether x still holds its values after the call
    cdef BatchStats stats
    cdef double *room           # (2, C) or (4, C): weight, bias, and in backward their gradients

    def __dealloc__(self):
        PyMem_Free(self.room)

    cdef int begin(self, Constants constants, cnp.ndarray x, const Kernel *kernel) except -1:
        cdef int k = feature_axis(x, constants.axis)
        cdef Job *job = &self.job
        if not dense(x, k, &job.M, &job.S):
            # In the order of x's memory, as far as a dense array can have it.
            x = np.array(x, order="K", copy=True, subok=False)
            dense(x, k, &job.M, &job.S)
        self.x = x
        job.C = cnp.PyArray_DIM(x, k)
        job.x = cnp.PyArray_DATA(x)
        job.is_float64 = cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT64
        job.activation = constants.activation
        job.eps = constants.eps
        job.settings = machine.settings()
        job.num_threads = 1
        if kernel.reads * job.M * job.C * job.S >= job.settings.parallel_from_elements:
            job.num_threads = machine.threads(constants.num_threads)
        if constants.features >= 0 and constants.features != job.C:
            raise ValueError(f"expected x with {constants.features} features along axis {constants.axis}, got shape {shape_of(x)}")
        return 0

    cdef int parameters(self, Constants constants, int rows) except -1:
        cdef Py_ssize_t C = self.job.C
        self.room = new_doubles(rows, C)
        self.job.weight = self.room
        self.job.bias = self.room + C
        if rows == 4:
            self.job.dweight = self.room + 2 * C
            self.job.dbias = self.room + 3 * C
        load(constants.weight, self.job.weight, C, 1, "weight")
        load(constants.bias, self.job.bias, C, 0, "bias")
        return 0

    cdef int statistics(self, BatchStats stats) except -1:
        if stats.C != self.job.C:
            raise ValueError(f"expected statistics of shape ({self.job.C},), got ({stats.C},)")
        self.job.mean = stats.data
        self.job.mean_low = stats.data + stats.C
        self.job.var = stats.data + 2 * stats.C
        return 0

    cdef int output(self, object out, cnp.ndarray over, object keep) except -1:
        """Where the result goes: `out`, or a new array laid out as x. `over` is the input that out may be, `keep` one that it must not touch."""
        cdef cnp.ndarray target
        if out is None:
            target = memory.empty_like(self.x)
            self.out = target
            self.fresh = True
        else:
            target = checked_out(out, self.x)
            self.out = out
            if keep is not None and overlap(target, keep):
                raise ValueError("expected out to share no memory with x, whose values the gradients need")
            self.inplace = identical(target, over)
            if not self.inplace and overlap(target, over):
                raise ValueError("expected out to be the input itself or to share no memory with it, got a partly overlapping array")
        self.y = target if usable_as(self.x, target) else memory.empty_like(self.x)
        self.job.y = cnp.PyArray_DATA(self.y)
        return 0

    cdef bint kept(self, object x, cnp.ndarray given) except -1:
        """Whether x, which `given` was made of, still holds its values."""
        if self.inplace:
            return False
        if x is given or self.fresh:
            return True
        # Backward reads x again: it is asked for its own memory, which is not that of `given` where its type was another.
        return not overlap(self.out, as_array(x, "x"))

    cdef int gradient_inputs(self, BatchStats stats, bint training) except -1:
        """What a gradient kernel reads besides the parameters; the gradients are 0 until then."""
        self.statistics(stats)
        self.job.dy = cnp.PyArray_DATA(self.dy)
        self.job.training = training
        memset(self.job.dweight, 0, self.job.C * sizeof(double))
        memset(self.job.dbias, 0, self.job.C * sizeof(double))
        return 0

    cdef tuple gradients(self):
        """dweight and dbias in new arrays."""
        cdef cnp.npy_intp shape[1]
        shape[0] = self.job.C
        dweight = cnp.PyArray_SimpleNew(1, shape, cnp.NPY_FLOAT64)
        dbias = cnp.PyArray_SimpleNew(1, shape, cnp.NPY_FLOAT64)
        store(self.job.dweight, dweight, self.job.C)
        store(self.job.dbias, dbias, self.job.C)
        return dweight, dbias

    cdef int finish(self) except -1:
        if self.y is not self.out:
            cnp.PyArray_CopyInto(self.out, self.y)
        return 0


cdef int call(const Kernel *kernel, Job *job) except -1:
    """Run a kernel, unless there is nothing to work on."""
    cdef int status
    cdef Py_ssize_t c
    if job.M * job.C * job.S == 0:
        if kernel == &KERNELS.moments or kernel == &KERNELS.forward:
            for c in range(job.C):
                job.mean[c] = job.mean_low[c] = job.var[c] = NAN
        return 0
    if kernel.reads * job.M * job.C * job.S < SHORT:
        status = kernel.run(job)
    else:
        with nogil:
            status = kernel.run(job)
    if status:
        raise MemoryError()
    return 0


cdef Call forward_call(Constants constants, cnp.ndarray given, object out, bint training):
    """The arrays of a forward, checked."""
    cdef Call c = Call.__new__(Call)
    c.begin(constants, given, &KERNELS.forward if training else &KERNELS.normalize)
    c.parameters(constants, 2)
    c.output(out, given, None)
    if training and constants.mean is not None:
        writable(constants.mean, c.job.C, True, "running_mean")
        writable(constants.var, c.job.C, True, "running_var")
    return c


cdef Call normalized(Constants constants, object x, object out):
    """A training forward, done but for the running averages."""
    cdef cnp.ndarray given = floating(x, "x")
    cdef Call c = forward_call(constants, given, out, True)
    cdef Job *job = &c.job
    cdef Py_ssize_t m = job.M * job.S
    if m == 1 and job.C:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape_of(c.x)}")
    c.stats = new_stats(job.C, m, constants.renorm is not None)
    c.statistics(c.stats)
    if c.stats.renormalised:
        renormalized(job, c.stats, <double *>cnp.PyArray_DATA(constants.mean), <double *>cnp.PyArray_DATA(constants.var), constants.renorm)
    else:
        call(&KERNELS.forward, job)
    c.finish()
    c.x_kept = c.kept(x, given)
    return c


cdef void average(Constants constants, Call c, double factor) noexcept:
    """``(1 - factor)*old + factor*batch`` into the running averages, if there are any. Comes after all that can fail."""
    cdef Job *job = &c.job
    cdef Py_ssize_t m = job.M * job.S
    cdef double *running_mean
    cdef double *running_var
    cdef Control word
    if constants.mean is None or m == 0:
        return
    # Arrays, as `writable` has seen: a check of the type here could raise.
    running_mean = <double *>cnp.PyArray_DATA(<cnp.ndarray>constants.mean)
    running_var = <double *>cnp.PyArray_DATA(<cnp.ndarray>constants.var)
    word = ieee()
    average_part(running_mean, running_var, job.mean, job.var, m, factor, constants.unbiased, job.C)
    as_before(word)


def forward(Constants constants not None, x, out, double factor):
    """Training forward: (y, BatchStats, whether x is still there)."""
    cdef Call c = normalized(constants, x, out)
    result = c.out, c.stats, c.x_kept
    average(constants, c, factor)
    return result


cdef int renormalized(Job *job, BatchStats stats, double *running_mean, double *running_var, tuple limits) except -1:
    cdef void *y = job.y
    cdef double *r = stats.correction()
    job.y = NULL
    call(&KERNELS.moments, job)
    job.y = y
    corrections(job, running_mean, running_var, limits[0], limits[1], r, r + job.C)
    correct_parameters(job, r, r + job.C)
    return call(&KERNELS.normalize, job)


cdef class Prepared:
    """The kernels' parameter rows of an inference, kept with what they were made of: in a short call a root and a division for each feature weigh."""
    cdef BatchStats stats
    cdef char *made_of          # the bytes of weight, bias, mean and var: whoever wrote into one of these arrays is seen
    cdef void *table
    cdef Py_ssize_t key[5]

    def __dealloc__(self):
        PyMem_Free(self.made_of)
        PyMem_Free(self.table)

    cdef int make(self, Constants constants, Job *job) except -1:
        cdef Py_ssize_t at = 0
        self.table = job.table = PyMem_Malloc(KERNELS.table_bytes(job))
        if self.table == NULL:
            raise MemoryError()
        self.made_of = <char *>new_doubles(4, job.C)
        write_key(job, self.key)
        for array in (constants.weight, constants.bias, constants.mean, constants.var):
            if array is not None:
                memcpy(self.made_of + at, cnp.PyArray_DATA(array), cnp.PyArray_NBYTES(array))
                at += cnp.PyArray_NBYTES(array)
        return 0

    cdef bint fits(self, Constants constants, const Job *job) except -1:
        cdef Py_ssize_t key[5]
        cdef Py_ssize_t at = 0
        write_key(job, key)
        if memcmp(key, self.key, sizeof(key)):
            return False
        return (same_bytes(constants.weight, job.C, self.made_of, &at) and same_bytes(constants.bias, job.C, self.made_of, &at)
                and same_bytes(constants.mean, job.C, self.made_of, &at) and same_bytes(constants.var, job.C, self.made_of, &at))


cdef void write_key(const Job *job, Py_ssize_t *key) noexcept:
    """What a table belongs to, besides the parameters."""
    key[0] = job.M if job.C * job.S < NARROW_LANES else 0    # short rows are folded, as many as there are
    key[1] = job.C
    key[2] = job.S
    key[3] = job.is_float64
    key[4] = <uintptr_t>job.y % LINE_BYTES


cdef inline bint same_bytes(cnp.ndarray array, Py_ssize_t C, const char *kept, Py_ssize_t *at) noexcept:
    """Whether an array still has C elements, and their bytes are those that were kept, from number `at` on, which moves on."""
    cdef Py_ssize_t first = at[0]
    if array is None:
        return True
    if cnp.PyArray_NDIM(array) != 1 or cnp.PyArray_DIM(array, 0) != C:
        return False
    at[0] += cnp.PyArray_NBYTES(array)
    return memcmp(cnp.PyArray_DATA(array), kept + first, cnp.PyArray_NBYTES(array)) == 0


cdef Call inferred(Constants constants, object x, object out):
    """An inference forward, done; its statistics are the running ones as they were at the call."""
    cdef cnp.ndarray given = floating(x, "x")
    cdef Call c = Call.__new__(Call)
    cdef Prepared prepared
    cdef Job *job = &c.job
    with cython.critical_section(constants):
        prepared = constants.prepared
    c.begin(constants, given, &KERNELS.normalize)
    c.output(out, given, None)
    if prepared is not None and prepared.fits(constants, job):
        c.stats = prepared.stats
        job.table, job.prepared = prepared.table, True
        call(&KERNELS.normalize, job)
    else:
        c.parameters(constants, 2)
        c.stats = new_stats(job.C, 0)
        c.statistics(c.stats)
        load(constants.mean, job.mean, job.C, 0, "running_mean")
        load(None, job.mean_low, job.C, 0, "mean_low")
        load(constants.var, job.var, job.C, 1, "running_var")
        prepared = None
        if constants.lasting and 0 < job.M * job.S <= FEW_VALUES and job.C:
            prepared = Prepared.__new__(Prepared)
            prepared.make(constants, job)
            prepared.stats = c.stats
        call(&KERNELS.normalize, job)
        if prepared is not None and job.prepared:
            with cython.critical_section(constants):
                constants.prepared = prepared
    c.finish()
    c.x_kept = c.kept(x, given)
    return c


def infer(Constants constants not None, x, out):
    """Inference with the running statistics: (y, BatchStats, whether x is still there)."""
    cdef Call c = inferred(constants, x, out)
    return c.out, c.stats, c.x_kept


def moments(Constants constants not None, x):
    """Of constants only the axis matters."""
    cdef Call c = Call.__new__(Call)
    cdef BatchStats stats
    c.begin(constants, floating(x, "x"), &KERNELS.moments)
    stats = new_stats(c.job.C, c.job.M * c.job.S)
    c.statistics(stats)
    call(&KERNELS.moments, &c.job)
    return stats


def backward(Constants constants not None, dy, x, stats, bint training, out):
    """(dx, dweight, dbias), the gradients of weight and bias in new float64 arrays."""
    cdef Call c = backward_call(constants, dy, x, stats, training, out)
    return c.out, *c.gradients()


def backward_into(Constants constants not None, dy, x, stats, bint training, out, dweight, dbias):
    """dx, with the gradients of weight and bias written into given arrays (or None)."""
    cdef Call c
    writable_gradients(constants, dweight, dbias)
    c = backward_call(constants, dy, x, stats, training, out)
    if constants.weight is not None:
        store(c.job.dweight, dweight, c.job.C)
        store(c.job.dbias, dbias, c.job.C)
    return c.out


cdef int writable_gradients(Constants constants, object dweight, object dbias) except -1:
    """Before anything is computed: a caller can reach these arrays and may have changed their flags."""
    if constants.weight is not None:
        writable(dweight, constants.features, False, "the gradient of weight")
        writable(dbias, constants.features, False, "the gradient of bias")
    return 0


cdef Call backward_arrays(Constants constants, object dy, object x, object out, const Kernel *kernel):
    """The arrays of a backward, or of a half of it, checked."""
    cdef Call c = Call.__new__(Call)
    cdef cnp.ndarray given = floating(x, "x")
    cdef cnp.ndarray gradient = floating(dy, "dy")
    c.begin(constants, given, kernel)
    if not cnp.PyArray_SAMESHAPE(gradient, given):
        raise ValueError(f"expected dy of x's shape {shape_of(given)}, got {shape_of(gradient)}")
    c.parameters(constants, 4)
    if kernel != &KERNELS.gradients:
        c.output(out, gradient, x if isinstance(x, np.ndarray) else given)  # given may be a view of x's own memory
    if cnp.PyArray_TYPE(gradient) != cnp.PyArray_TYPE(c.x) or not usable_as(c.x, gradient):
        c.dy = memory.empty_like(c.x)
        np.copyto(c.dy, gradient, casting="same_kind")
    else:
        c.dy = gradient
    return c


cdef Call backward_call(Constants constants, object dy, object x, object stats, bint training, object out):
    cdef double *r = NULL
    if not isinstance(stats, BatchStats):
        raise TypeError(f"expected stats to be a BatchStats, as batch_norm_forward returns, got {type(stats).__name__}")
    cdef Call c = backward_arrays(constants, dy, x, out, &KERNELS.backward)
    cdef Job *job = &c.job
    c.gradient_inputs(stats, training)
    if training and (<BatchStats>stats).count != job.M * job.S:
        raise ValueError(f"expected statistics of the {job.M * job.S} values per feature of x, got those of {(<BatchStats>stats).count}")
    if (<BatchStats>stats).renormalised:
        r = (<BatchStats>stats).correction()
        correct_parameters(job, r, r + job.C)
    call(&KERNELS.backward, job)
    c.finish()
    if (<BatchStats>stats).renormalised:
        correct_gradients(job, r, r + job.C)
    return c


# --- a layer's plain call, and its way back -----------------------------------------------------------------------------------------------------

UNMADE = "expected a layer whose constructor has run, got one without its arrays: a subclass calls super().__init__() first"


@cython.auto_pickle(False)
cdef class Callable:
    """`layer(x, out)` and `layer.backward(dy, out)` without a way through Python, which would take as long as the arithmetic on a small batch.

    What they read and write of BatchNorm, whose base this is; its docstrings say what it means.
    """
    cdef public bint training
    cdef public bint frozen
    cdef public object num_batches_tracked
    cdef public object grads
    cdef public object _momentum
    cdef public object _ghost_size
    cdef public Constants _constants
    # The function that goes back, x, the statistics that it was normalised with, and whether they are its own; or None.
    cdef public object _saved

    def __call__(self, x, out=None, *, mask=None):
        cdef Call c
        cdef Constants constants
        cdef tuple saved = None
        cdef double factor = 0
        with cython.critical_section(self):  # another thread may set an attribute that makes them anew
            constants = self._constants
        if constants is None:
            raise AttributeError(UNMADE)
        # Without running statistics, inference computes the batch's for want of others, as PyTorch's does.
        cdef bint training = (self.training and not self.frozen) or constants.mean is None
        if mask is not None or self._ghost_size is not None:
            return self._forward_in_batches(x, out, mask, training)
        if training:
            c = normalized(constants, x, out)
        else:
            c = inferred(constants, x, out)
        if c.x_kept:
            saved = (backward_into, x, c.stats, training)
        if training and constants.mean is not None and c.stats.count:
            with cython.critical_section(self):
                tracked = self.num_batches_tracked + 1
                factor = 1 / tracked if self._momentum is None else self._momentum
                average(constants, c, factor)
                self.num_batches_tracked = tracked
        # Inference is called from several threads at once, which must not let go of what was saved before twice.
        with cython.critical_section(self):
            self._saved = saved
        return c.out

    def backward(self, dy, out=None):
        """Return the gradient of the last forward with respect to x, and fill ``grads``.

        g is the gradient before the activation, and x_hat is the normalised x::

            grads["weight"] = sum(g*x_hat)
            grads["bias"] = sum(g)
            dx = weight/sqrt(var + eps)*(g - mean(g) - x_hat*mean(g*x_hat))    after a forward in training
            dx = weight/sqrt(var + eps)*g                                      after a forward in inference

        It may be called several times after one forward.

        Parameters
        ----------
        dy : array_like of the shape of x
            Gradient of the loss with respect to y.
        out : numpy.ndarray, optional
            Array of the shape and dtype of x, which receives dx. It may be dy itself, never x.

        Returns
        -------
        numpy.ndarray
            dx, of the shape, dtype and memory order of x; out itself if it was given.

        Raises
        ------
        RuntimeError
            There was no forward, or the last one overwrote x (out was x).
        ValueError, TypeError
            An array does not fit.
        """
        cdef Constants constants
        with cython.critical_section(self):
            constants, saved = self._constants, self._saved
        if constants is None:
            raise AttributeError(UNMADE)
        if saved is None:
            raise RuntimeError("expected a forward before backward, and one that did not overwrite x")
        back, x, stats, training = saved
        dweight = dbias = None
        if constants.weight is not None:
            dweight, dbias = self.grads["weight"], self.grads["bias"]
        return back(constants, dy, x, stats, training, out, dweight, dbias)


# --- halves of a call, for statistics and gradients that are summed over more than one array (as over processes) ------------

def normalize(Constants constants not None, x, BatchStats stats not None, out):
    """y, from given statistics."""
    cdef cnp.ndarray given = floating(x, "x")
    cdef Call c = forward_call(constants, given, out, False)
    c.statistics(stats)
    call(&KERNELS.normalize, &c.job)
    c.finish()
    return c.out


def gradients(Constants constants not None, dy, x, BatchStats stats not None):
    """(dweight, dbias) of these arrays alone, from statistics that may be of more."""
    cdef Call c = backward_arrays(constants, dy, x, None, &KERNELS.gradients)
    c.gradient_inputs(stats, True)
    call(&KERNELS.gradients, &c.job)
    return c.gradients()


def input_gradient(Constants constants not None, dy, x, BatchStats stats not None, dweight, dbias, out):
    """dx, where dweight and dbias are summed over the stats.count values that the statistics are of."""
    cdef Call c = backward_arrays(constants, dy, x, out, &KERNELS.input_gradient)
    c.gradient_inputs(stats, True)
    c.job.count = stats.count
    load(dweight, c.job.dweight, c.job.C, 0, "dweight")
    load(dbias, c.job.dbias, c.job.C, 0, "dbias")
    call(&KERNELS.input_gradient, &c.job)
    c.finish()
    return c.out


# --- calls made in parts (batches.py): everything about the whole is checked before the first part is computed -------------

def arrays_of_forward(Constants constants not None, x, out, bint training):
    """(x, y, out, whether x will still be there): x and y as the kernels take them; y is what out becomes a copy of, where it is another array."""
    cdef cnp.ndarray given = floating(x, "x")
    cdef Call c = forward_call(constants, given, out, training)
    return c.x, np.asarray(c.y), c.out, c.kept(x, given)  # y is sliced: by NumPy's rules, not by a subclass's


def arrays_of_backward(Constants constants not None, dy, x, out, dweight, dbias):
    """(dy, x, dx, out), likewise."""
    writable_gradients(constants, dweight, dbias)
    cdef Call c = backward_arrays(constants, dy, x, out, &KERNELS.backward)
    return c.dy, c.x, np.asarray(c.y), c.out
