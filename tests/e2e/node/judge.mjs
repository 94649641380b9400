// What a program in Node does with the official SDK, told line by line as JSON.
// node judge.mjs BASE_URL SCENARIO ARGUMENTS

import OpenAI from 'openai';

const [baseURL, scenario, argumentsText] = process.argv.slice(2);
const asked = JSON.parse(argumentsText);
const client = new OpenAI({ baseURL, apiKey: 'none', maxRetries: 0, ...asked.client });

const tell = (told) => process.stdout.write(`${JSON.stringify(told)}\n`);

const scenarios = {
  async create() {
    tell(await client.responses.create(asked.request));
  },

  // The helper folds events into snapshots of its own, and refuses those that do not fit.
  async stream() {
    const stream = client.responses.stream(asked.request);
    for await (const event of stream) tell(event);
    tell(await stream.finalResponse());
  },

  // The same events without the helper: as they are numbered, and nothing before the first.
  async retrieve() {
    const { id, ...query } = asked.request;
    const events = await client.responses.retrieve(id, { ...query, stream: true });
    for await (const event of events) tell(event);
  },

  async conversation() {
    const made = await client.conversations.create({ metadata: { topic: 'node' } });
    for (const input of asked.said) {
      await client.responses.create({ model: 'm', input, conversation: made.id });
    }
    const texts = [];
    const pages = { order: 'asc', limit: 2 };
    for await (const item of client.conversations.items.list(made.id, pages)) {
      texts.push(item.content[0].text);
    }
    tell(texts);
    tell(await client.conversations.delete(made.id));
    const error = await client.conversations.retrieve(made.id).catch((error) => error);
    tell({ name: error.constructor.name, status: error.status, code: error.code });
  },
};

await scenarios[scenario]();
