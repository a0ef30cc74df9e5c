// Blocks and hits without the GIL's being given away, and without a Python frame for each shard.
//
// The functions do what `gpu_cache/pool/lease.py` and `ShardIndex.hits` do in Python, which remain for where this is
// not built. They hold the GIL from the first shard to the last, wait for nothing, and call Python code of no caller,
// but for `__hash__` and `__eq__` of keys.

#include <torch/csrc/autograd/python_variable.h>
#include <structmember.h>
#include <torch/csrc/Storage.h>

#include <memory>

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
    return;  // nobody drains the deque any more, and to wait for the GIL would be for ever
  }
  const PyGILState_STATE state = PyGILState_Ensure();
  PyObject *type, *value, *traceback;
  PyErr_Fetch(&type, &value, &traceback);
  held->lease->has_fired = true;
  Ref done(PyObject_CallOneArg(held->fired, reinterpret_cast<PyObject*>(held->lease)));
  if (done.object == nullptr) {
    PyErr_WriteUnraisable(held->fired);
  }
  Py_DECREF(held->lease);
  Py_DECREF(held->fired);
  PyErr_Restore(type, value, traceback);
  held.reset();
  PyGILState_Release(state);
}

at::Tensor dense(c10::Storage storage, const at::Tensor& like, c10::IntArrayRef shape) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), like.key_set(), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_contiguous(shape);
  return made;
}

// carve(arena, offset, nbytes, template, shape, fired) -> (base, loan, lease)
//
// Two tensors over one block, like `template` in dtype and device, with version counters of their own. Their storage
// has exactly `nbytes`, and cannot be resized.
PyObject* carve(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(
      count == 6 && THPStorage_Check(args[0]) && THPVariable_Check(args[3]) && PyTuple_Check(args[4]),
      "carve takes a storage, offset, bytes, a tensor, a tuple and a function");
  const c10::Storage& arena = THPStorage_Unpack(args[0]);
  const int64_t offset = PyLong_AsSsize_t(args[1]);
  const int64_t nbytes = PyLong_AsSsize_t(args[2]);
  const at::Tensor& like = THPVariable_Unpack(args[3]);
  PyObject* shape = args[4];
  c10::SmallVector<int64_t, 8> sizes;
  bool is_negative = false, is_huge = false;
  int64_t wanted = static_cast<int64_t>(like.dtype().itemsize());
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(shape); ++i) {
    sizes.push_back(PyLong_AsSsize_t(PyTuple_GET_ITEM(shape, i)));
    is_negative |= sizes.back() < 0;
    is_huge |= __builtin_mul_overflow(wanted, sizes.back(), &wanted);
  }
  if (PyErr_Occurred()) {
    return nullptr;
  }
  if (is_negative) {
    return PyErr_Format(PyExc_ValueError, "shape %R has a negative length", shape);
  }
  if (is_huge || wanted != nbytes) {
    return PyErr_Format(
        PyExc_ValueError, "%zd bytes are no %s tensor of shape %R", static_cast<Py_ssize_t>(nbytes),
        c10::toString(like.scalar_type()), shape);
  }
  const auto room = static_cast<int64_t>(arena.nbytes());
  TORCH_CHECK_VALUE(
      offset >= 0 && nbytes > 0 && offset <= room && nbytes <= room - offset, nbytes, " bytes at ", offset,
      " are not in an arena of ", room);

  auto* lease = reinterpret_cast<Lease*>(LeaseType.tp_alloc(&LeaseType, 0));
  if (lease == nullptr) {
    return nullptr;
  }
  Ref kept(reinterpret_cast<PyObject*>(lease));
  auto held = std::make_unique<Held>();
  held->arena = arena;
  held->lease = reinterpret_cast<Lease*>(Py_NewRef(kept.object));
  held->fired = Py_NewRef(args[5]);
  void* bytes = static_cast<char*>(arena.mutable_data()) + offset;
  c10::Storage block(
      c10::Storage::use_byte_size_t(), nbytes, at::DataPtr(bytes, held.release(), &end_block, like.device()),
      /*allocator=*/nullptr, /*resizable=*/false);
  Ref loan(THPVariable_Wrap(dense(block, like, sizes)));
  Ref base(THPVariable_Wrap(dense(std::move(block), like, sizes)));
  if (base.object == nullptr || loan.object == nullptr) {
    return nullptr;
  }
  PyObject_GC_UnTrack(kept.object);  // its only cycle is that of its slab, which ends when the block does
  PyObject_GC_UnTrack(base.object);  // is in no cycle: it is never handed out, and refers to no Python object
  return PyTuple_Pack(3, base.object, loan.object, kept.object);
  END_HANDLE_TH_ERRORS
}

// track(objects): the reverse of `untrack`.
PyObject* track(PyObject*, PyObject* objects) {
  if (!PyList_Check(objects)) {
    return PyErr_Format(PyExc_TypeError, "track takes a list");
  }
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(objects); ++i) {
    if (!PyObject_GC_IsTracked(PyList_GET_ITEM(objects, i))) {
      PyObject_GC_Track(PyList_GET_ITEM(objects, i));
    }
  }
  Py_RETURN_NONE;
}

// untrack(objects): leave records that are in no cycle out of the garbage collector's lists.
PyObject* untrack(PyObject*, PyObject* objects) {
  if (!PyList_Check(objects)) {
    return PyErr_Format(PyExc_TypeError, "untrack takes a list");
  }
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(objects); ++i) {
    PyObject_GC_UnTrack(PyList_GET_ITEM(objects, i));
  }
  Py_RETURN_NONE;
}

// ---- Hits -----------------------------------------------------------------------------------------------------------

// Where the slots of `Entry` and `Copy` are in their objects.
struct {
  Py_ssize_t copy, promise, base, loan, version, nbytes, completion;
} slots;
PyObject* move_to_end;

PyObject*& slot(PyObject* object, Py_ssize_t offset) {
  return *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + offset);
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

// bind(Entry, Copy, move_to_end): once, before `hits`.
PyObject* bind(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 3) {
    PyErr_SetString(PyExc_TypeError, "bind takes 3 arguments");
    return nullptr;
  }
  PyObject *entry = args[0], *copy = args[1];
  if (!(find_slot(entry, "copy", slots.copy) && find_slot(entry, "promise", slots.promise) &&
        find_slot(copy, "base", slots.base) && find_slot(copy, "loan", slots.loan) &&
        find_slot(copy, "version", slots.version) && find_slot(copy, "nbytes", slots.nbytes) &&
        find_slot(copy, "completion", slots.completion))) {
    return nullptr;
  }
  Py_XSETREF(move_to_end, Py_NewRef(args[2]));
  Py_RETURN_NONE;
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
  const Py_ssize_t at = Py_TYPE(object)->tp_weaklistoffset;
  return at > 0 && slot(object, at) != nullptr;
}

// Whether a reader let it go, so that another can have it. `references` to it are ours.
bool is_free(PyObject* loan, const at::Tensor& tensor) {
  return Py_REFCNT(loan) == 1 && tensor.use_count() == 1 && !tensor.requires_grad() && !tensor.grad().defined() &&
      !has_weak_references(loan) && !has_attributes(loan);
}

bool looks_alike(const c10::TensorImpl* one, const c10::TensorImpl* other) {
  return one->storage().unsafeGetStorageImpl() == other->storage().unsafeGetStorageImpl() &&
      one->storage_offset() == other->storage_offset() && one->sizes() == other->sizes() &&
      one->strides() == other->strides() && one->dtype() == other->dtype() && one->key_set() == other->key_set();
}

// The tensor for a reader of a shard, a new reference: the one that its last reader let go of, made to look like the
// shard again; else another alias, and `left` gets the one before.
PyObject* lend(PyObject* copy, PyObject* left) {
  PyObject*& loan = slot(copy, slots.loan);
  const at::Tensor& base = THPVariable_Unpack(slot(copy, slots.base));
  const bool is_lent = loan != Py_None;
  if (is_lent && is_free(loan, THPVariable_Unpack(loan))) {
    at::Tensor tensor = THPVariable_Unpack(loan);
    if (!looks_alike(tensor.unsafeGetTensorImpl(), base.unsafeGetTensorImpl())) {
      tensor.set_data(base);
    }
    return Py_NewRef(loan);
  }
  const at::Tensor& counted = is_lent ? THPVariable_Unpack(loan) : base;
  auto alias = base.unsafeGetTensorImpl()->shallow_copy_and_detach(
      counted.unsafeGetTensorImpl()->version_counter(), /*allow_tensor_metadata_change=*/true);
  Ref made(THPVariable_Wrap(at::Tensor(std::move(alias))));
  if (made.object == nullptr || PyList_Append(left, loan) < 0) {
    return nullptr;
  }
  Py_SETREF(loan, Py_NewRef(made.object));
  return made.release();
}

bool is_changed(PyObject* copy) {
  PyObject* loan = slot(copy, slots.loan);
  const at::Tensor& counted = THPVariable_Unpack(loan == Py_None ? slot(copy, slots.base) : loan);
  return counted.unsafeGetTensorImpl()->version_counter().current_version() !=
      static_cast<uint32_t>(PyLong_AsUnsignedLongMask(slot(copy, slots.version)));
}

// lend(copies, left) -> list of tensors
PyObject* lend_all(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 2 && PyList_Check(args[0]) && PyList_Check(args[1]), "lend takes two lists");
  const Py_ssize_t length = PyList_GET_SIZE(args[0]);
  Ref lent(PyList_New(length));
  for (Py_ssize_t i = 0; lent.object != nullptr && i < length; ++i) {
    PyObject* tensor = lend(PyList_GET_ITEM(args[0], i), args[1]);
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
  Ref keys(PySequence_Fast(args[1], "keys are no sequence"));
  if (keys.object == nullptr) {
    return nullptr;
  }
  const Py_ssize_t length = PySequence_Fast_GET_SIZE(keys.object);
  Ref lent(PyList_New(length));
  if (lent.object == nullptr) {
    return nullptr;
  }
  int64_t nbytes = 0;
  PyObject* latest = Py_None;
  for (Py_ssize_t i = 0; i < length; ++i) {
    PyObject* key = PySequence_Fast_GET_ITEM(keys.object, i);
    PyObject* entry = PyDict_GetItemWithError(table, key);
    PyObject* copy = entry == nullptr ? Py_None : slot(entry, slots.copy);
    if (copy == Py_None) {
      return PyErr_Occurred() ? nullptr : Py_NewRef(Py_None);
    }
    PyObject* promise = PyDict_GetItemWithError(expected, key);
    if (promise != nullptr && promise != slot(entry, slots.promise)) {
      const int is_equal = PyObject_RichCompareBool(promise, slot(entry, slots.promise), Py_EQ);
      if (is_equal != 1) {
        return is_equal < 0 ? nullptr : Py_NewRef(Py_None);
      }
    } else if (PyErr_Occurred()) {
      return nullptr;
    }
    if (checks_versions && is_changed(copy)) {
      return Py_NewRef(Py_None);
    }
    PyObject* tensor = lend(copy, left);
    if (tensor == nullptr) {
      return nullptr;
    }
    PyList_SET_ITEM(lent.object, i, tensor);
    PyObject* moving[] = {table, key};
    Ref moved(PyObject_Vectorcall(move_to_end, moving, 2, nullptr));
    if (moved.object == nullptr) {
      return nullptr;
    }
    nbytes += PyLong_AsSsize_t(slot(copy, slots.nbytes));
    PyObject* completion = slot(copy, slots.completion);
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

PyMethodDef methods[] = {
    {"bind", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(bind)), METH_FASTCALL, nullptr},
    {"carve", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(carve)), METH_FASTCALL, nullptr},
    {"lend", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(lend_all)), METH_FASTCALL, nullptr},
    {"track", track, METH_O, nullptr},
    {"untrack", untrack, METH_O, nullptr},
    {"hits", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(hits)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "gpu_cache.native.blocks", nullptr, -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit_blocks() {
  Ref made(PyModule_Create(&module));
  if (made.object == nullptr || !ready_lease_type() ||
      PyModule_AddObjectRef(made.object, "Lease", reinterpret_cast<PyObject*>(&LeaseType)) < 0) {
    return nullptr;
  }
  return made.release();
}
