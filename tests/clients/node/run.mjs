// Runs calls with the official openai client for Node and prints what an application would have seen.
//
// Environment: BASE_URL (ends with /v1), API_KEY.
// Standard input: a JSON list of calls {name, resource, body?, apiKey?, stopAfter?}.
//   resource   "chat", "completions", "responses" or "models"
//   body       what the application passes to create(); its `stream` decides how the answer is read
//   apiKey     a key other than API_KEY
//   stopAfter  leave a stream after that many chunks, as an application does with `break`
// Standard output: a JSON object name -> {value} | {chunks} | {chunks?, error}.
//
// Retries are off, so that one call is one request.

import OpenAI from "openai";
import { text } from "node:stream/consumers";

function clientFor(call) {
  return new OpenAI({
    baseURL: process.env.BASE_URL,
    apiKey: call.apiKey ?? process.env.API_KEY,
    maxRetries: 0,
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

async function run(call) {
  const chunks = [];
  try {
    const answer = await start(clientFor(call), call);
    if (!call.body?.stream) {
      return { value: answer };
    }
    await readStream(answer, call, chunks);
    return { chunks };
  } catch (error) {
    return { chunks, error: describe(error) };
  }
}

const results = {};
for (const call of JSON.parse(await text(process.stdin))) {
  results[call.name] = await run(call);
}
process.stdout.write(JSON.stringify(results));
