// Runs calls with the official openai client for Node and prints what an application would have seen.
//
// Standard input: lines of JSON {baseURL, apiKey, calls, together?}; baseURL ends with /v1. Each line gets one line in
// answer. The calls are made one after the other, or all at once when `together` is true; each has a client of its own.
// calls: a list of {name, resource, body?, apiKey?, stopAfter?, maxRetries?}.
//   resource   "chat", "completions", "responses" or "models"
//   body       what the application passes to create(); its `stream` decides how the answer is read
//   apiKey     another key than that of the line
//   stopAfter  leave a stream after that many chunks, as an application does with `break`
//   maxRetries how often the client tries again by itself; 0 unless given, so that one call is one request
// Standard output, for each line: a JSON object name -> {value} | {chunks} | {chunks?, error}.

import OpenAI from "openai";
import { createInterface } from "node:readline";

function clientFor(server, call) {
  return new OpenAI({
    baseURL: server.baseURL,
    apiKey: call.apiKey ?? server.apiKey,
    maxRetries: call.maxRetries ?? 0,
  });
}

function start(client, call) {
  switch (call.resource) {
    case "chat":
      return client.chat.completions.create(call.body);
    case "completions":
      return client.completions.create(call.body);
    case "responses":
      return client.responses.create(call.body);
    case "models":
      return client.models.list();
    default:
      throw new Error(`unknown resource in call ${call.name}: ${call.resource}`);
  }
}

async function readStream(stream, call, chunks) {
  for await (const chunk of stream) {
    chunks.push(chunk);
    if (chunks.length === call.stopAfter) {
      break;
    }
  }
}

function describe(error) {
  if (!(error instanceof OpenAI.OpenAIError)) {
    throw error;
  }
  return {
    class: error.constructor.name,
    message: error.message,
    status: error.status ?? null,
    type: error.type ?? null,
    code: error.code ?? null,
    param: error.param ?? null,
    requestID: error.requestID ?? null,
  };
}

async function run(server, call) {
  const chunks = [];
  try {
    const answer = await start(clientFor(server, call), call);
    if (!call.body?.stream) {
      return { value: answer };
    }
    await readStream(answer, call, chunks);
    return { chunks };
  } catch (error) {
    return { chunks, error: describe(error) };
  }
}

for await (const line of createInterface({ input: process.stdin })) {
  const { calls, together, ...server } = JSON.parse(line);
  const results = {};
  const running = [];
  for (const call of calls) {
    const done = run(server, call).then((result) => {
      results[call.name] = result;
    });
    running.push(done);
    if (!together) {
      await done;
    }
  }
  await Promise.all(running);
  process.stdout.write(`${JSON.stringify(results)}\n`);
}
