// Server-sent events out of a stream of bytes.

/**
 * Yield the data of every event of `body` (a ReadableStream of UTF-8 bytes), in order.
 *
 * Lines may end in LF, CRLF or CR; comments and other fields are skipped; an event that the end of
 * the stream cuts off is dropped, as the standard says. Cancels the stream when the caller stops.
 */
export async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = null;
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const text = rest + decoder.decode(value, { stream: true });
      // A CR at the very end may be half of a CRLF: it waits for what follows.
      const usable = text.endsWith("\r") ? text.length - 1 : text.length;
      let start = 0;
      for (const end of text.slice(0, usable).matchAll(/\r\n|\n|\r/g)) {
        const line = text.slice(start, end.index);
        start = end.index + end[0].length;
        if (line === "") {
          if (data !== null) yield data;
          data = null;
        } else if (line.startsWith("data:")) {
          const piece = line.slice(line[5] === " " ? 6 : 5);
          data = data === null ? piece : `${data}\n${piece}`;
        }
      }
      rest = text.slice(start);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
