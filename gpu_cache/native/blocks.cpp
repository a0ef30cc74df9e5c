// Blocks and hits without the GIL's being given away, and without a Python frame for each shard.
//
// The functions do what `gpu_cache/pool/block.py`, `gpu_cache/pool/lease.py` and `gpu_cache/index/lending.py` do in
// Python, which remain for where this is not built. They hold the GIL from the first shard to the last, wait for
// nothing, and call Python code of no caller, but for `__hash__` and `__eq__` of keys.

#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/python_variable.h>
#include <structmember.h>
#include <torch/csrc/Storage.h>

#include <memory>
#include <utility>

namespace {

// A strong reference that is given up at the end of the block.
struct Ref {
  PyObject* object;
  explicit Ref(PyObject* owned = nullptr) : object(owned) {}
  Ref(const Ref&) = delete;
  Ref& operator=(const Ref&) = delete;
  ~Ref() { Py_XDECREF(object); }
  PyObject* release() { return std::exchange(object, nullptr); }
};

// ---- Leases ---------------------------------------------------------------------------------------------------------

// Says which bytes of a slab a block has; goes to `fired` when the block's last alias died. Called, it is None from
// then on, else itself: as a weak reference on the block is.
struct Lease {
  PyObject_HEAD
  PyObject* key;
  PyObject* slab;
  Py_ssize_t offset;
  Py_ssize_t nbytes;
  bool has_fired;
};

int lease_traverse(Lease* self, visitproc visit, void* arg) {
  Py_VISIT(self->key);
  Py_VISIT(self->slab);
  return 0;
}

int lease_clear(Lease* self) {
  Py_CLEAR(self->key);
  Py_CLEAR(self->slab);
  return 0;
}

void lease_dealloc(Lease* self) {
  PyObject_GC_UnTrack(self);
  lease_clear(self);
  Py_TYPE(self)->tp_free(reinterpret_cast<PyObject*>(self));
}

PyObject* lease_call(Lease* self, PyObject*, PyObject*) {
  return Py_NewRef(self->has_fired ? Py_None : reinterpret_cast<PyObject*>(self));
}

PyMemberDef lease_members[] = {
    {"key", T_OBJECT, offsetof(Lease, key), 0, nullptr},
    {"slab", T_OBJECT, offsetof(Lease, slab), 0, nullptr},
    {"offset", T_PYSSIZET, offsetof(Lease, offset), 0, nullptr},
    {"nbytes", T_PYSSIZET, offsetof(Lease, nbytes), 0, nullptr},
    {nullptr}};

PyTypeObject LeaseType = {PyVarObject_HEAD_INIT(nullptr, 0)};

bool ready_lease_type() {
  LeaseType.tp_name = "gpu_cache.native.blocks.Lease";
  LeaseType.tp_basicsize = sizeof(Lease);
  LeaseType.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC;
  LeaseType.tp_traverse = reinterpret_cast<traverseproc>(lease_traverse);
  LeaseType.tp_clear = reinterpret_cast<inquiry>(lease_clear);
  LeaseType.tp_dealloc = reinterpret_cast<destructor>(lease_dealloc);
  LeaseType.tp_call = reinterpret_cast<ternaryfunc>(lease_call);
  LeaseType.tp_members = lease_members;
  return PyType_Ready(&LeaseType) == 0;
}

void set_tracked(PyObject* record, bool is_wanted) {
  if (PyObject_IS_GC(record) && (PyObject_GC_IsTracked(record) != 0) != is_wanted) {
    is_wanted ? PyObject_GC_Track(record) : PyObject_GC_UnTrack(record);
  }
}

// What the storage of a block keeps: its arena, so that the bytes stay mapped, and its lease.
struct Held {
  c10::Storage arena;
  Lease* lease;
  PyObject* fired;  // appends to a deque; runs on any thread, also where locks of ours are held
};

// The last alias died. May be called on any thread, with the GIL or without.
void end_block(void* context) {
  std::unique_ptr<Held> held(static_cast<Held*>(context));
  if (!Py_IsInitialized() || Py_IsFinalizing()) {
    held.release();  // nothing drains the deque any more, and waiting for the GIL, also to free the arena, has no end
    return;
  }
  const PyGILState_STATE state = PyGILState_Ensure();
  PyObject *type, *error, *traceback;
  PyErr_Fetch(&type, &error, &traceback);
  auto* lease = reinterpret_cast<PyObject*>(held->lease);
  if (!std::exchange(held->lease->has_fired, true)) {
    set_tracked(lease, true);  // if its pool is gone, it is in a cycle with its slab
    Ref done(PyObject_CallOneArg(held->fired, lease));
    if (done.object == nullptr) {
      PyErr_WriteUnraisable(held->fired);
    }
  }
  Py_DECREF(lease);
  Py_DECREF(held->fired);
  held.reset();
  PyErr_Restore(type, error, traceback);
  PyGILState_Release(state);
}

at::Tensor dense(c10::Storage storage, const at::Tensor& like, c10::IntArrayRef shape) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), like.key_set(), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_contiguous(shape);
  return made;
}

struct Block {
  Ref base, loan, lease;
};

// Makes two tensors over one block, like `like` in dtype and device, with version counters of their own, and their
// lease, which fires once it is armed. Their storage has exactly `nbytes`, and cannot be resized.
bool make_block(
    const c10::Storage& arena, int64_t offset, int64_t nbytes, const at::Tensor& like, PyObject* shape, PyObject* fired,
    Block& made) {
  TORCH_CHECK_TYPE(PyTuple_Check(shape), "a shape is a tuple");
  c10::SmallVector<int64_t, 8> sizes;
  bool is_negative = false, is_huge = false;
  int64_t wanted = static_cast<int64_t>(like.dtype().itemsize());
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(shape); ++i) {
    sizes.push_back(PyLong_AsSsize_t(PyTuple_GET_ITEM(shape, i)));
    is_negative |= sizes.back() < 0;
    is_huge |= __builtin_mul_overflow(wanted, sizes.back(), &wanted);
  }
  if (PyErr_Occurred()) {
    return false;
  }
  if (is_negative) {
    PyErr_Format(PyExc_ValueError, "shape %R has a negative length", shape);
    return false;
  }
  if (is_huge || wanted != nbytes) {
    PyErr_Format(
        PyExc_ValueError, "%zd bytes are no %s tensor of shape %R", static_cast<Py_ssize_t>(nbytes),
        c10::toString(like.scalar_type()), shape);
    return false;
  }
  const auto room = static_cast<int64_t>(arena.nbytes());
  TORCH_CHECK_VALUE(
      offset >= 0 && nbytes > 0 && offset <= room && nbytes <= room - offset, nbytes, " bytes at ", offset,
      " are not in an arena of ", room);

  auto* lease = reinterpret_cast<Lease*>(LeaseType.tp_alloc(&LeaseType, 0));
  if (lease == nullptr) {
    return false;
  }
  made.lease.object = reinterpret_cast<PyObject*>(lease);
  lease->has_fired = true;  // not if this fails: the range is the caller's still
  auto held = std::make_unique<Held>();
  held->arena = arena;
  held->lease = reinterpret_cast<Lease*>(Py_NewRef(made.lease.object));
  held->fired = Py_NewRef(fired);
  void* bytes = static_cast<char*>(arena.mutable_data()) + offset;
  c10::Storage block(
      c10::Storage::use_byte_size_t(), nbytes, at::DataPtr(bytes, held.release(), &end_block, like.device()),
      /*allocator=*/nullptr, /*resizable=*/false);
  made.loan.object = THPVariable_Wrap(dense(block, like, sizes));
  made.base.object = THPVariable_Wrap(dense(std::move(block), like, sizes));
  return made.base.object != nullptr && made.loan.object != nullptr;
}

// Lets the lease of a block fire, and leaves what is in no cycle out of the garbage collector's lists.
void arm(Block& made) {
  reinterpret_cast<Lease*>(made.lease.object)->has_fired = false;
  set_tracked(made.lease.object, false);  // its only cycle is that of its slab, which ends when the block does
  set_tracked(made.base.object, false);  // it is never handed out, and refers to no Python object
}

// carve(arena, offset, nbytes, template, shape, fired) -> (base, loan, lease): one block.
PyObject* carve(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(
      count == 6 && THPStorage_Check(args[0]) && THPVariable_Check(args[3]),
      "carve takes a storage, offset, bytes, a tensor, a tuple and a function");
  const int64_t offset = PyLong_AsSsize_t(args[1]);
  const int64_t nbytes = PyLong_AsSsize_t(args[2]);
  Block made;
  if (!make_block(THPStorage_Unpack(args[0]), offset, nbytes, THPVariable_Unpack(args[3]), args[4], args[5], made)) {
    return nullptr;
  }
  PyObject* found = PyTuple_Pack(3, made.base.object, made.loan.object, made.lease.object);
  if (found != nullptr) {
    arm(made);
  }
  return found;
  END_HANDLE_TH_ERRORS
}

// ---- Records --------------------------------------------------------------------------------------------------------

// Where the slots of `Entry` and `Copy` are in their objects.
struct {
  Py_ssize_t copy, promise;
} slots;
struct {
  Py_ssize_t key, base, lease, nbytes, loan, completion, version, checksum, spares;
} copy_slots;
PyTypeObject *Entry, *Copy;  // null before they are bound
PyObject* move_to_end;
Py_ssize_t most_spares;

PyObject*& slot(PyObject* object, Py_ssize_t offset) {
  return *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + offset);
}

// What is in a slot, borrowed; None if it is empty.
PyObject* value(PyObject* object, Py_ssize_t offset) {
  PyObject* found = slot(object, offset);
  return found == nullptr ? Py_None : found;
}

bool is_a(PyObject* object, PyTypeObject* type) {
  if (type != nullptr && PyObject_TypeCheck(object, type)) {
    return true;
  }
  PyErr_Format(PyExc_TypeError, "%R is no %s", object, type == nullptr ? "record: nothing is bound" : type->tp_name);
  return false;
}

bool find_slot(PyObject* type, const char* name, Py_ssize_t& offset) {
  Ref found(PyObject_GetAttrString(type, name));
  if (found.object == nullptr) {
    return false;
  }
  if (!Py_IS_TYPE(found.object, &PyMemberDescr_Type)) {
    PyErr_Format(PyExc_TypeError, "%s of %R is no slot", name, type);
    return false;
  }
  const PyMemberDef* member = reinterpret_cast<PyMemberDescrObject*>(found.object)->d_member;
  if (member->type != T_OBJECT_EX) {
    PyErr_Format(PyExc_TypeError, "%s of %R is no slot", name, type);
    return false;
  }
  offset = member->offset;
  return true;
}

// bind_copies(Copy): once, before `carve_all` and `lend`.
PyObject* bind_copies(PyObject*, PyObject* copy) {
  if (!PyType_Check(copy)) {
    return PyErr_Format(PyExc_TypeError, "a class is expected, not %R", copy);
  }
  auto found = copy_slots;
  if (!(find_slot(copy, "key", found.key) && find_slot(copy, "base", found.base) &&
        find_slot(copy, "lease", found.lease) && find_slot(copy, "nbytes", found.nbytes) &&
        find_slot(copy, "loan", found.loan) && find_slot(copy, "completion", found.completion) &&
        find_slot(copy, "version", found.version) && find_slot(copy, "checksum", found.checksum) &&
        find_slot(copy, "spares", found.spares))) {
    return nullptr;
  }
  constexpr size_t num_slots = sizeof(copy_slots) / sizeof(Py_ssize_t);
  if (reinterpret_cast<PyTypeObject*>(copy)->tp_basicsize != sizeof(PyObject) + num_slots * sizeof(PyObject*)) {
    return PyErr_Format(PyExc_TypeError, "%R has other slots than those that are known", copy);
  }
  copy_slots = found;
  Py_XSETREF(Copy, reinterpret_cast<PyTypeObject*>(Py_NewRef(copy)));
  Py_RETURN_NONE;
}

// bind_entries(Entry, move_to_end, most_spares): once, before `lend` and `hits`.
PyObject* bind_entries(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 3 || !PyType_Check(args[0])) {
    PyErr_SetString(PyExc_TypeError, "bind_entries takes a class, a function and a number");
    return nullptr;
  }
  auto found = slots;
  const Py_ssize_t most = PyLong_AsSsize_t(args[2]);
  if (PyErr_Occurred() || !find_slot(args[0], "copy", found.copy) || !find_slot(args[0], "promise", found.promise)) {
    return nullptr;
  }
  slots = found;
  Py_XSETREF(Entry, reinterpret_cast<PyTypeObject*>(Py_NewRef(args[0])));
  Py_XSETREF(move_to_end, Py_NewRef(args[1]));
  most_spares = most;
  Py_RETURN_NONE;
}

// ---- Runs -----------------------------------------------------------------------------------------------------------

// A `Copy` of a block, and its lease in `leases`, by offset. Takes the block's references.
PyObject* make_copy(PyObject* key, Block& made, PyObject* nbytes, PyObject* leases) {
  Ref copy(Copy->tp_alloc(Copy, 0));
  Ref offset(PyLong_FromSsize_t(reinterpret_cast<Lease*>(made.lease.object)->offset));
  Ref version(PyLong_FromLong(0));  // of new tensors
  if (copy.object == nullptr || offset.object == nullptr || version.object == nullptr ||
      PyDict_SetItem(leases, offset.object, made.lease.object) < 0) {
    return nullptr;
  }
  arm(made);
  set_tracked(made.loan.object, false);  // until a reader has it
  set_tracked(copy.object, false);  // it is in no cycle
  slot(copy.object, copy_slots.key) = Py_NewRef(key);
  slot(copy.object, copy_slots.base) = made.base.release();
  slot(copy.object, copy_slots.lease) = made.lease.release();
  slot(copy.object, copy_slots.nbytes) = Py_NewRef(nbytes);
  slot(copy.object, copy_slots.loan) = made.loan.release();
  slot(copy.object, copy_slots.completion) = Py_NewRef(Py_None);
  slot(copy.object, copy_slots.version) = version.release();
  slot(copy.object, copy_slots.checksum) = Py_NewRef(Py_None);
  slot(copy.object, copy_slots.spares) = Py_NewRef(Py_None);
  return copy.release();
}

PyObject *key_name, *dtype_name, *shape_name, *nbytes_name;

// The `Copy` of one shard, `offset` bytes into the arena.
PyObject* carve_shard(
    PyObject* spec, const c10::Storage& arena, PyObject* slab, Py_ssize_t offset, Py_ssize_t alignment,
    PyObject* templates, PyObject* fired, PyObject* leases) {
  Ref key(PyObject_GetAttr(spec, key_name)), dtype(PyObject_GetAttr(spec, dtype_name));
  Ref shape(PyObject_GetAttr(spec, shape_name)), length(PyObject_GetAttr(spec, nbytes_name));
  if (key.object == nullptr || dtype.object == nullptr || shape.object == nullptr || length.object == nullptr) {
    return nullptr;
  }
  const Py_ssize_t nbytes = PyLong_AsSsize_t(length.object);
  Ref like(Py_XNewRef(PyDict_GetItemWithError(templates, dtype.object)));
  if (PyErr_Occurred()) {
    return nullptr;
  }
  TORCH_CHECK_TYPE(like.object != nullptr && THPVariable_Check(like.object), "there is no template of that dtype");
  Block made;
  if (!make_block(arena, offset, nbytes, THPVariable_Unpack(like.object), shape.object, fired, made)) {
    return nullptr;
  }
  auto* lease = reinterpret_cast<Lease*>(made.lease.object);
  lease->key = Py_NewRef(key.object);
  lease->slab = Py_NewRef(slab);
  lease->offset = offset;
  lease->nbytes = (nbytes + alignment - 1) / alignment * alignment;
  return make_copy(key.object, made, length.object, leases);
}

// carve_all(arena, slab, first, specs, offsets, alignment, templates, fired, leases, copies)
//
// Appends a `Copy` of each shard. If it raises, `leases` and `copies` have those of the shards before, so that no lease
// fires before the pool knows it.
PyObject* carve_all(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(
      count == 10 && THPStorage_Check(args[0]) && PyDict_Check(args[6]) && PyDict_Check(args[8]) &&
          PyList_Check(args[9]) && Copy != nullptr,
      "carve_all takes a storage, a slab, its first byte, specs, offsets, an alignment, a dict, a function, a dict and "
      "a list");
  const Py_ssize_t first = PyLong_AsSsize_t(args[2]), alignment = PyLong_AsSsize_t(args[5]);
  Ref specs(PySequence_Tuple(args[3])), offsets(PySequence_Tuple(args[4]));
  if (specs.object == nullptr || offsets.object == nullptr || PyErr_Occurred()) {
    return nullptr;
  }
  const Py_ssize_t length = PyTuple_GET_SIZE(specs.object);
  TORCH_CHECK_VALUE(length == PyTuple_GET_SIZE(offsets.object) && alignment > 0, "each shard has one offset");
  for (Py_ssize_t i = 0; i < length; ++i) {
    const Py_ssize_t offset = first + PyLong_AsSsize_t(PyTuple_GET_ITEM(offsets.object, i));
    if (PyErr_Occurred()) {
      return nullptr;
    }
    Ref copy(carve_shard(
        PyTuple_GET_ITEM(specs.object, i), THPStorage_Unpack(args[0]), args[1], offset, alignment, args[6], args[7],
        args[8]));
    if (copy.object == nullptr || PyList_Append(args[9], copy.object) < 0) {
      return nullptr;
    }
  }
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// ---- Hits -----------------------------------------------------------------------------------------------------------

PyObject* set_all_tracked(PyObject* records, bool is_wanted) {
  if (!PyList_Check(records)) {
    return PyErr_Format(PyExc_TypeError, "a list of records is expected, not %R", records);
  }
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(records); ++i) {
    set_tracked(PyList_GET_ITEM(records, i), is_wanted);
  }
  Py_RETURN_NONE;
}

// untrack(records): leave records that are in no cycle out of the garbage collector's lists.
PyObject* untrack(PyObject*, PyObject* records) {
  return set_all_tracked(records, false);
}

// track(records): the reverse.
PyObject* track(PyObject*, PyObject* records) {
  return set_all_tracked(records, true);
}

bool has_attributes(PyObject* object) {
  Ref found(PyObject_GenericGetDict(object, nullptr));
  if (found.object == nullptr) {
    PyErr_Clear();
    return true;
  }
  return PyDict_GET_SIZE(found.object) != 0;
}

bool has_weak_references(PyObject* object) {
  const Py_ssize_t at = Py_TYPE(object)->tp_weaklistoffset;  // negative in Python 3.12: before the object
  return at != 0 && slot(object, at) != nullptr;
}

// Whether a reader let it go, and left nothing on it, so that another can have it: no gradient, hook, attribute or
// class. The one reference to it is ours.
bool is_free(PyObject* loan, const at::Tensor& tensor) {
  return Py_REFCNT(loan) == 1 && tensor.use_count() == 1 && tensor.unsafeGetTensorImpl()->autograd_meta() == nullptr &&
      Py_IS_TYPE(loan, reinterpret_cast<PyTypeObject*>(THPVariableClass)) && !has_weak_references(loan) &&
      !has_attributes(loan);
}

bool looks_alike(const c10::TensorImpl* one, const c10::TensorImpl* other) {
  return one->storage().unsafeGetStorageImpl() == other->storage().unsafeGetStorageImpl() &&
      one->storage_offset() == other->storage_offset() && one->sizes() == other->sizes() &&
      one->strides() == other->strides() && one->dtype() == other->dtype() && one->key_set() == other->key_set();
}

const at::Tensor* tensor_in(PyObject* copy, Py_ssize_t offset) {
  PyObject* found = value(copy, offset);
  return found != Py_None && THPVariable_Check(found) ? &THPVariable_Unpack(found) : nullptr;
}

// Takes the first item out of a list: a new reference.
PyObject* pop_first(PyObject* list) {
  Ref first(Py_NewRef(PyList_GET_ITEM(list, 0)));
  return PyList_SetSlice(list, 0, 1, nullptr) < 0 ? nullptr : first.release();
}

// Makes another tensor a copy's loan: the next spare if its reader let it go, else an alias. See `_replace_loan` of
// `gpu_cache/index/lending.py`.
bool replace_loan(PyObject* copy, PyObject* left) {
  const at::Tensor *base = tensor_in(copy, copy_slots.base), *last = tensor_in(copy, copy_slots.loan);
  if (!PyList_Check(value(copy, copy_slots.spares))) {
    Ref made(PyList_New(0));
    if (made.object == nullptr) {
      return false;
    }
    Py_XSETREF(slot(copy, copy_slots.spares), made.release());
  }
  Ref spares(Py_NewRef(slot(copy, copy_slots.spares)));
  PyObject* loan = value(copy, copy_slots.loan);
  if (loan != Py_None && PyList_Append(Py_REFCNT(loan) > 1 ? spares.object : left, loan) < 0) {
    return false;
  }
  const Py_ssize_t length = PyList_GET_SIZE(spares.object);
  if (length > 0 && Py_REFCNT(PyList_GET_ITEM(spares.object, 0)) == 1) {
    PyObject* spare = pop_first(spares.object);
    if (spare == nullptr) {
      return false;
    }
    Py_XSETREF(slot(copy, copy_slots.loan), spare);
    return true;
  }
  c10::impl::ExcludeDispatchKeyGuard without_modes(c10::DispatchKey::Python);  // they would make it, in Python
  auto alias = base->unsafeGetTensorImpl()->shallow_copy_and_detach(
      (last == nullptr ? base : last)->unsafeGetTensorImpl()->version_counter(),
      /*allow_tensor_metadata_change=*/true);
  PyObject* made = THPVariable_Wrap(at::Tensor(std::move(alias)));
  if (made == nullptr) {
    return false;
  }
  Py_XSETREF(slot(copy, copy_slots.loan), made);
  if (length == 0) {
    return true;
  }
  Ref oldest(pop_first(spares.object));  // held: the next look is at another one
  return oldest.object != nullptr &&
      PyList_Append(length - 1 < most_spares ? spares.object : left, oldest.object) == 0;
}

// The tensor for a reader of a shard, a new reference: one that its last reader let go of, made to look like the shard
// again; else another alias. `left` gets those that stay with their readers.
PyObject* lend(PyObject* copy, PyObject* left) {
  const at::Tensor* base = tensor_in(copy, copy_slots.base);
  if (base == nullptr) {
    return PyErr_Format(PyExc_TypeError, "%R has no tensor", copy);
  }
  c10::TensorImpl* wanted = base->unsafeGetTensorImpl();
  while (true) {
    const at::Tensor* last = tensor_in(copy, copy_slots.loan);
    PyObject* loan = value(copy, copy_slots.loan);
    if (last != nullptr && is_free(loan, *last) &&
        last->unsafeGetTensorImpl()->has_compatible_shallow_copy_type(wanted->key_set())) {
      at::Tensor tensor = *last;
      if (!looks_alike(tensor.unsafeGetTensorImpl(), wanted)) {
        tensor.set_data(*base);
      }
      set_tracked(loan, true);  // from now on it may be in a cycle
      return Py_NewRef(loan);
    }
    if (!replace_loan(copy, left)) {
      return nullptr;
    }
  }
}

bool is_changed(PyObject* copy) {
  const at::Tensor* counted = tensor_in(copy, copy_slots.loan);
  if (counted == nullptr) {
    counted = tensor_in(copy, copy_slots.base);
  }
  return counted == nullptr ||
      counted->unsafeGetTensorImpl()->version_counter().current_version() !=
      static_cast<uint32_t>(PyLong_AsUnsignedLongMask(value(copy, copy_slots.version)));
}

// lend(copies, left) -> list of tensors
PyObject* lend_all(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 2 && PyList_Check(args[0]) && PyList_Check(args[1]), "lend takes two lists");
  const Py_ssize_t length = PyList_GET_SIZE(args[0]);
  Ref lent(PyList_New(length));
  for (Py_ssize_t i = 0; lent.object != nullptr && i < length; ++i) {
    Ref copy(Py_NewRef(PyList_GET_ITEM(args[0], i)));
    PyObject* tensor = is_a(copy.object, Copy) ? lend(copy.object, args[1]) : nullptr;
    if (tensor == nullptr) {
      return nullptr;
    }
    PyList_SET_ITEM(lent.object, i, tensor);
  }
  return lent.release();
  END_HANDLE_TH_ERRORS
}

// hits(table, keys, expected, checks_versions, left, completions) -> (tensors, nbytes), or None if not all are hits.
PyObject* hits(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(
      count == 6 && PyDict_Check(args[0]) && PyDict_Check(args[2]) && PyList_Check(args[4]) && PyDict_Check(args[5]),
      "hits takes a table, keys, a dict, a bool, a list and a dict");
  PyObject *table = args[0], *expected = args[2], *left = args[4], *completions = args[5];
  const bool checks_versions = args[3] == Py_True;
  // References of our own: whatever `__eq__` of a key or of an owner does, also to the caller's list and dict.
  Ref keys(PySequence_Tuple(args[1]));
  if (keys.object == nullptr) {
    return nullptr;
  }
  const Py_ssize_t length = PyTuple_GET_SIZE(keys.object);
  Ref lent(PyList_New(length));
  if (lent.object == nullptr) {
    return nullptr;
  }
  int64_t nbytes = 0;
  PyObject* latest = Py_None;
  for (Py_ssize_t i = 0; i < length; ++i) {
    PyObject* key = PyTuple_GET_ITEM(keys.object, i);
    Ref entry(Py_XNewRef(PyDict_GetItemWithError(table, key)));
    if (entry.object == nullptr) {
      return PyErr_Occurred() ? nullptr : Py_NewRef(Py_None);
    }
    if (!is_a(entry.object, Entry)) {
      return nullptr;
    }
    Ref copy(Py_NewRef(value(entry.object, slots.copy)));
    if (copy.object == Py_None) {
      return Py_NewRef(Py_None);
    }
    if (!is_a(copy.object, Copy)) {
      return nullptr;
    }
    Ref promise(Py_XNewRef(PyDict_GetItemWithError(expected, key)));
    if (promise.object == nullptr && PyErr_Occurred()) {
      return nullptr;
    }
    Ref kept(Py_NewRef(value(entry.object, slots.promise)));
    if (promise.object != nullptr && promise.object != Py_None && promise.object != kept.object) {
      const int is_equal = PyObject_RichCompareBool(promise.object, kept.object, Py_EQ);
      if (is_equal != 1) {
        return is_equal < 0 ? nullptr : Py_NewRef(Py_None);
      }
    }
    if (checks_versions && is_changed(copy.object)) {
      return PyErr_Occurred() ? nullptr : Py_NewRef(Py_None);
    }
    PyObject* tensor = lend(copy.object, left);
    if (tensor == nullptr) {
      return nullptr;
    }
    PyList_SET_ITEM(lent.object, i, tensor);
    PyObject* moving[] = {table, key};
    Ref moved(PyObject_Vectorcall(move_to_end, moving, 2, nullptr));
    if (moved.object == nullptr) {
      return nullptr;
    }
    nbytes += PyLong_AsSsize_t(value(copy.object, copy_slots.nbytes));
    PyObject* completion = value(copy.object, copy_slots.completion);
    if (completion != latest && completion != Py_None) {
      if (PyDict_SetItem(completions, completion, Py_None) < 0) {
        return nullptr;
      }
      latest = completion;
    }
  }
  return Py_BuildValue("(NL)", lent.release(), static_cast<long long>(nbytes));
  END_HANDLE_TH_ERRORS
}

// ---- Deaths ---------------------------------------------------------------------------------------------------------

// strip(tensors) -> husks
//
// Empties the list. Tensors that only the list holds lose their bytes, and are returned: a drop gives the GIL away.
PyObject* strip(PyObject*, PyObject* tensors) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(PyList_Check(tensors), "strip takes a list");
  Ref husks(PyList_New(0));
  c10::Storage nothing;
  if (husks.object == nullptr) {
    return nullptr;
  }
  for (Py_ssize_t left; (left = PyList_GET_SIZE(tensors)) > 0;) {
    Ref one(Py_NewRef(PyList_GET_ITEM(tensors, left - 1)));
    if (PyList_SetSlice(tensors, left - 1, left, nullptr) < 0) {
      return nullptr;
    }
    if (!THPVariable_Check(one.object) || Py_REFCNT(one.object) != 1 || has_weak_references(one.object)) {
      continue;
    }
    const at::Tensor& tensor = THPVariable_Unpack(one.object);
    c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
    if (tensor.use_count() != 1 || !impl->has_storage() || !impl->allow_tensor_metadata_change()) {
      continue;
    }
    if (PyList_Append(husks.object, one.object) < 0) {
      return nullptr;
    }
    if (!nothing || nothing.device() != impl->device()) {
      nothing = c10::Storage(
          c10::Storage::use_byte_size_t(), 0, at::DataPtr(nullptr, impl->device()), /*allocator=*/nullptr,
          /*resizable=*/false);
    }
    impl->set_sizes_contiguous({0});
    impl->set_storage_offset(0);
    impl->set_storage_keep_dtype(nothing);
  }
  return husks.release();
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"bind_copies", bind_copies, METH_O, nullptr},
    {"bind_entries", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(bind_entries)), METH_FASTCALL, nullptr},
    {"carve", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(carve)), METH_FASTCALL, nullptr},
    {"carve_all", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(carve_all)), METH_FASTCALL, nullptr},
    {"lend", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(lend_all)), METH_FASTCALL, nullptr},
    {"strip", strip, METH_O, nullptr},
    {"track", track, METH_O, nullptr},
    {"untrack", untrack, METH_O, nullptr},
    {"hits", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(hits)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "gpu_cache.native.blocks", nullptr, -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit_blocks() {
  key_name = PyUnicode_InternFromString("key");
  dtype_name = PyUnicode_InternFromString("dtype");
  shape_name = PyUnicode_InternFromString("shape");
  nbytes_name = PyUnicode_InternFromString("nbytes");
  Ref made(PyModule_Create(&module));
  if (made.object == nullptr || !ready_lease_type() ||
      PyModule_AddObjectRef(made.object, "Lease", reinterpret_cast<PyObject*>(&LeaseType)) < 0) {
    return nullptr;
  }
  return made.release();
}
