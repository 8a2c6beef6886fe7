// A model that autoprune built, for browsers and Node. Needs the WebAssembly file beside this one, nothing else.

const MODEL = {};

const ARRAYS = {
  float32: Float32Array, float64: Float64Array, int64: BigInt64Array, int32: Int32Array, int16: Int16Array,
  int8: Int8Array, uint8: Uint8Array, bool: Uint8Array,
};
const LINE = 64;  // bytes that whatever lies in memory begins at a multiple of
const PAGE = 65536;

/** A loaded model: `(await Model.load()).run(...)`. One call at a time; load it again for another worker. */
export class Model {
  #exports;
  #places = new Map();
  #end;

  /**
   * Loads the model.
   * @param {string | URL | BufferSource | WebAssembly.Module} [source] the .wasm file, or its address; the one beside
   *   this file by default.
   * @returns {Promise<Model>}
   */
  static async load(source = new URL(MODEL.library, import.meta.url)) {
    const module = source instanceof WebAssembly.Module ? source : await WebAssembly.compile(await bytesOf(source));
    return new Model(await WebAssembly.instantiate(module, {}));
  }

  /** @param {WebAssembly.Instance} instance of the .wasm file. */
  constructor(instance) {
    this.#exports = instance.exports;
    this.#end = instance.exports.__heap_base.value;
    for (const call of MODEL.calls) {
      const place = instance.exports[`${call.prefix}_mark`]?.value ?? 0;
      const mark = new BigUint64Array(instance.exports.memory.buffer, place, 1)[0].toString(16).padStart(16, "0");
      if (mark !== call.mark) {
        throw new Error(`${MODEL.library} and ${MODEL.name}.mjs are not of one build: one of them may be an old copy.`);
      }
    }
  }

  /** For every set of shapes that the model was built for, name, type and shape of each input. */
  get inputs() { return MODEL.calls.map((call) => call.inputs); }

  /** Likewise of the outputs. */
  get outputs() { return MODEL.calls.map((call) => call.outputs); }

  /**
   * Runs the model.
   * @param {...(TypedArray | {data: TypedArray, shape: number[]})} inputs in the model's order, row by row. A shape is
   *   needed where several that the model was built for have as many entries.
   * @returns {Object<string, TypedArray>} the outputs by name, new arrays.
   */
  run(...inputs) {
    const call = this.#callFor(inputs.map((input) => (ArrayBuffer.isView(input) ? { data: input } : input)));
    const place = this.#placeFor(call);
    call.inputs.forEach((port, number) => {
      const data = ArrayBuffer.isView(inputs[number]) ? inputs[number] : inputs[number].data;
      this.#view(port, place.tensors[number]).set(data);
    });
    check(this.#exports[`${call.prefix}_run`](...place.tensors, place.workspace));
    const results = place.tensors.slice(call.inputs.length);
    return Object.fromEntries(call.outputs.map((port, number) => [port.name, this.#view(port, results[number]).slice()]));
  }

  #callFor(given) {
    const ports = MODEL.calls[0].inputs;
    if (given.length !== ports.length) {
      throw new TypeError(`${MODEL.name} takes ${ports.length} inputs, not ${given.length}.`);
    }
    ports.forEach((port, number) => {
      if (!(given[number]?.data instanceof ARRAYS[port.type])) {
        throw new TypeError(`${port.name} must be a ${ARRAYS[port.type].name}, or {data, shape} of one.`);
      }
    });
    const fits = ({ data, shape }, port) => data.length === port.count
      && (shape === undefined || String(shape) === String(port.shape));
    const found = MODEL.calls.filter((call) => call.inputs.every((port, number) => fits(given[number], port)));
    const built = MODEL.calls.map((call) => call.inputs.map((port) => `[${port.shape}]`).join(" and ")).join(" or ");
    if (found.length > 1) {
      throw new RangeError(`these arrays fit several shapes of ${built}: pass them as {data, shape}.`);
    }
    if (found.length === 0) {
      const told = given.map(({ data, shape }) => `${data.length} entries${shape ? ` of shape [${shape}]` : ""}`);
      throw new RangeError(`${MODEL.name} was built for shapes ${built}, not ${told.join(" and ")}.`);
    }
    return found[0];
  }

  #placeFor(call) {
    if (!this.#places.has(call.prefix)) {
      const workspace = this.#take(call.workspace_bytes);
      check(this.#exports[`${call.prefix}_prepare`](workspace));
      const tensors = [...call.inputs, ...call.outputs].map((port) => this.#take(port.bytes));
      this.#places.set(call.prefix, { workspace, tensors });
    }
    return this.#places.get(call.prefix);
  }

  #take(bytes) {
    const start = Math.ceil(this.#end / LINE) * LINE;
    this.#end = start + bytes;
    const missing = this.#end - this.#exports.memory.buffer.byteLength;
    if (missing > 0) this.#exports.memory.grow(Math.ceil(missing / PAGE));
    return start;
  }

  #view(port, place) {
    return new ARRAYS[port.type](this.#exports.memory.buffer, place, port.count);
  }
}

async function bytesOf(source) {
  if (!(source instanceof URL) && typeof source !== "string") return source;
  const address = new URL(source, import.meta.url);
  if (address.protocol === "file:") return (await import("node:fs/promises")).readFile(address);
  const response = await fetch(address);
  if (!response.ok) throw new Error(`${address} cannot be fetched: ${response.status} ${response.statusText}.`);
  return response.arrayBuffer();
}

function check(status) {
  if (status !== 0) throw new RangeError(`${MODEL.name}: ${MODEL.statuses[status]}.`);
}
