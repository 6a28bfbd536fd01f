"use strict";

/* MessagePack as wovr_jax/export/wire.py writes it: plain values, and arrays of numbers as maps of four entries.
   A decoded array is {shape, data}, data a typed array; Ndarray makes one to send. */

class Ndarray {
  constructor(shape, data) { this.shape = shape; this.data = data; }
}

const DTYPES = { "|u1": Uint8Array, "|b1": Uint8Array, "<f4": Float32Array, "<i4": Int32Array };

function decode(buffer) {
  const view = new DataView(buffer), text = new TextDecoder();
  let at = 0;
  const take = (read, bytes) => { const value = view[read](at); at += bytes; return value; };
  const bytes = (count) => { const part = new Uint8Array(buffer, at, count); at += count; return part; };
  const string = (count) => text.decode(bytes(count));
  const list = (count) => Array.from({ length: count }, item);
  function map(count) {
    const entries = {};
    for (let i = 0; i < count; i++) {
      // Keys of an array's map are bytes; as text they are the same names.
      const key = item();
      entries[key instanceof Uint8Array ? text.decode(key) : key] = item();
    }
    return "__ndarray__" in entries ? array(entries) : "__npgeneric__" in entries ? entries.data : entries;
  }
  function array({ data, dtype, shape }) {
    // A copy: numbers of four bytes have to lie at a multiple of four.
    return new Ndarray(shape, new DTYPES[dtype](data.slice().buffer));
  }
  function item() {
    const code = take("getUint8", 1);
    if (code < 0x80) return code;
    if (code < 0x90) return map(code & 15);
    if (code < 0xa0) return list(code & 15);
    if (code < 0xc0) return string(code & 31);
    if (code >= 0xe0) return code - 256;
    switch (code) {
      case 0xc0: return null;
      case 0xc2: return false;
      case 0xc3: return true;
      case 0xc4: return bytes(take("getUint8", 1));
      case 0xc5: return bytes(take("getUint16", 2));
      case 0xc6: return bytes(take("getUint32", 4));
      case 0xca: return take("getFloat32", 4);
      case 0xcb: return take("getFloat64", 8);
      case 0xcc: return take("getUint8", 1);
      case 0xcd: return take("getUint16", 2);
      case 0xce: return take("getUint32", 4);
      case 0xcf: return Number(take("getBigUint64", 8));
      case 0xd0: return take("getInt8", 1);
      case 0xd1: return take("getInt16", 2);
      case 0xd2: return take("getInt32", 4);
      case 0xd3: return Number(take("getBigInt64", 8));
      case 0xd9: return string(take("getUint8", 1));
      case 0xda: return string(take("getUint16", 2));
      case 0xdb: return string(take("getUint32", 4));
      case 0xdc: return list(take("getUint16", 2));
      case 0xdd: return list(take("getUint32", 4));
      case 0xde: return map(take("getUint16", 2));
      case 0xdf: return map(take("getUint32", 4));
    }
    throw new Error(`a message of the server has the code ${code}, which is not used here`);
  }
  return item();
}

function encode(message) {
  const out = [], text = new TextEncoder();
  const number = (write, bytes, value) => {
    const view = new DataView(new ArrayBuffer(bytes));
    view[write](0, value);
    out.push(...new Uint8Array(view.buffer));
  };
  const sized = (code, data) => { out.push(code); number("setUint16", 2, data.length); out.push(...data); };
  const string = (value) => sized(0xda, text.encode(value));
  function item(value) {
    if (value === null || value === undefined) out.push(0xc0);
    else if (typeof value === "boolean") out.push(value ? 0xc3 : 0xc2);
    else if (typeof value === "string") string(value);
    else if (Number.isInteger(value) && value >= 0 && value < 2 ** 32) { out.push(0xce); number("setUint32", 4, value); }
    else if (typeof value === "number") { out.push(0xcb); number("setFloat64", 8, value); }
    else if (value instanceof Uint8Array) sized(0xc5, value);
    else if (Array.isArray(value)) { out.push(0xdc); number("setUint16", 2, value.length); value.forEach(item); }
    else if (value instanceof Ndarray) {
      const entries = [["__ndarray__", true], ["data", new Uint8Array(value.data.buffer)], ["dtype", "<f4"],
        ["shape", value.shape]];
      out.push(0x80 | entries.length);
      for (const [name, part] of entries) { item(text.encode(name)); item(part); }
    } else {
      const entries = Object.entries(value);
      out.push(0x80 | entries.length);
      for (const [name, part] of entries) { item(name); item(part); }
    }
  }
  item(message);
  return new Uint8Array(out);
}
