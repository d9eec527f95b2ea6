// Streaming chat in JavaScript: one file without dependencies, for Node 18 or later and for browsers.
//
//   node examples/javascript/chat.mjs "What is the capital of France?" [http://127.0.0.1:8000]
//
//   import { streamChat } from "./chat.mjs";           // a browser's origin must be in [api] cors_origins
//   for await (const chunk of streamChat({ baseUrl, messages, signal })) show(chunk.choices[0]?.delta.content ?? "");
//
// Leaving the loop, or aborting the signal, closes the connection, which ends the request on the server.

/** What the server refused, or what went wrong within a stream that had begun (then without a status). */
export class ApiError extends Error {
  constructor(error, status, requestId) {
    super(error.message ?? "no message");
    this.name = "ApiError";
    this.type = error.type ?? null;
    this.code = error.code ?? null;
    this.param = error.param ?? null;
    this.status = status ?? null;
    this.requestId = requestId ?? null;
  }
}

/**
 * The events {event, data} of a Server-Sent Events body, in whatever pieces it arrives.
 *
 * Lines end with LF, CR or CRLF; comments are skipped; data lines are joined by newlines. A character that is cut
 * between two pieces waits in the decoder, half a line in `rest`.
 */
export async function* readEvents(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder("utf-8"); // drops a byte order mark
  let rest = "", afterCr = false, event = "", data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return; // an event that was cut off is none
      let text = decoder.decode(value, { stream: true });
      if (text === "") continue; // a part of a character
      const secondHalf = afterCr && text[0] === "\n"; // of a CRLF
      afterCr = text.endsWith("\r");
      if (secondHalf) text = text.slice(1);
      const lines = text.split(/\r\n|\n|\r/);
      lines[0] = rest + lines[0];
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield { event: event || "message", data: data.join("\n") };
          event = "", data = [];
          continue;
        }
        const colon = line.indexOf(":");
        const name = colon < 0 ? line : line.slice(0, colon);
        const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
        if (name === "data") data.push(value);
        else if (name === "event") event = value; // comments have an empty name
      }
    }
  } finally {
    await reader.cancel().catch(() => {}); // closes the connection where the caller leaves early
  }
}

/**
 * The chunks of POST /v1/chat/completions. Everything but the three options goes into the request as it is.
 *
 * Throws ApiError for what the server refuses and for errors within the stream, an AbortError where `signal` was
 * aborted, and an Error where the stream breaks off.
 */
export async function* streamChat({ baseUrl = "http://127.0.0.1:8000", apiKey, signal, ...params }) {
  const headers = { "Content-Type": "application/json" };
  if (apiKey) headers.Authorization = `Bearer ${apiKey}`;
  const body = JSON.stringify({ ...params, stream: true });
  const response = await fetch(`${baseUrl}/v1/chat/completions`, { method: "POST", headers, body, signal });
  const requestId = response.headers.get("x-request-id");
  if (!response.ok) {
    const text = await response.text();
    let error;
    try {
      error = JSON.parse(text).error;
    } catch {} // a proxy's page
    throw new ApiError(error ?? { message: text.slice(0, 200) || response.statusText }, response.status, requestId);
  }
  for await (const { data } of readEvents(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error, null, requestId);
    yield chunk;
  }
  throw new Error("the stream broke off before its end");
}

async function main([question = "What is the capital of France?", baseUrl]) {
  const stop = new AbortController();
  process.once("SIGINT", () => stop.abort());
  const messages = [{ role: "user", content: question }];
  for await (const chunk of streamChat({ baseUrl, messages, temperature: 0, max_tokens: 64, signal: stop.signal })) {
    process.stdout.write(chunk.choices[0]?.delta.content ?? "");
  }
  process.stdout.write("\n");
}

if (globalThis.process?.versions?.node && process.argv[1]) {
  const [{ existsSync, realpathSync }, { pathToFileURL }] = await Promise.all([import("node:fs"), import("node:url")]);
  const script = process.argv[1]; // of `node -e`, an argument
  if (existsSync(script) && import.meta.url === pathToFileURL(realpathSync(script)).href) {
    main(process.argv.slice(2)).catch((error) => {
      const reason = error.cause ? ` (${error.cause.message || error.cause.code})` : ""; // of a failed fetch
      console.error(`${error.name}: ${error.message}${reason}`);
      process.exitCode = 1;
    });
  }
}
