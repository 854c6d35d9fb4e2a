// Chat: a thread of messages and what can be done with them.

import { fresh, resume, take } from "./answer.js";
import { add, addAnswer, messages, path, show, versions } from "./conversation.js";
import { batched } from "./dom.js";
import { messageView } from "./message.js";
import { welcome } from "./welcome.js";

const SAVE_EVERY = 2000;

export class Chat {
  #app;
  #box;
  #views = new Map();
  #draw;
  #dirty = new Set();

  /** `app` is the page's shared parts, see main.js; messages appear in `box`. */
  constructor(app, box) {
    this.#app = app;
    this.#box = box;
    this.#draw = batched(() => {
      for (const id of this.#dirty) this.#views.get(id)?.update();
      this.#dirty.clear();
      app.follow.grown();
    });
  }

  get conversation() {
    return this.#app.current;
  }

  /** Show the path of the conversation that is open, keeping the views that stay. */
  render() {
    const nodes = path(this.conversation);
    const ids = new Set(nodes.map((node) => node.id));
    for (const id of this.#views.keys()) if (!ids.has(id)) this.#views.delete(id);
    if (!nodes.length) {
      this.#box.replaceChildren(welcome("chat", this.#app.model, (text) => this.send(text)));
      this.#app.follow.toStart();
      return;
    }
    const wanted = nodes.map((node) => this.#view(node).root);
    const shown = [...this.#box.children];
    if (wanted.length !== shown.length || wanted.some((root, i) => root !== shown[i])) {
      this.#box.replaceChildren(...wanted);
    }
    for (const node of nodes) this.#views.get(node.id).update();
    this.#app.follow.grown();
  }

  /** Forget every view: the conversation was read anew. */
  reset() {
    this.#views.clear();
    this.#box.replaceChildren();
  }

  #view(node) {
    if (!this.#views.has(node.id)) {
      this.#views.set(node.id, messageView(node, this.#acts(node), () => this.#context(node)));
    }
    return this.#views.get(node.id);
  }

  #context(node) {
    const all = versions(this.conversation, node);
    return {
      versions: all.length,
      place: all.indexOf(node),
      last: this.conversation.leaf === node.id,
      busy: this.#app.runs.has(this.conversation.id),
      probabilities: Boolean(this.#app.settings.get("probabilities")),
    };
  }

  #acts(node) {
    return {
      edit: (text) => this.send(text, node.parent),
      again: () => this.#ask(this.conversation, node.parent),
      retry: () => this.#retry(node),
      goOn: () => this.#goOn(node),
      results: (list) => this.#results(node, list),
      settings: () => this.#app.sheet.open(),
      show: (by) => {
        const all = versions(this.conversation, node);
        show(this.conversation, all[all.indexOf(node) + by]);
        this.#app.store.save(this.conversation);
        this.render();
      },
    };
  }

  /** Say `text` below `parent` (by default at the end) and have it answered. */
  send(text, parent = this.conversation.leaf) {
    const { conversation } = this;
    if (this.#app.runs.has(conversation.id)) return;
    const node = add(conversation, parent, { role: "user", content: text });
    this.#ask(conversation, node.id);
  }

  /** Turn the last question into a field. */
  editLast() {
    const node = path(this.conversation).findLast((n) => n.role === "user");
    const view = node && this.#views.get(node.id);
    if (view && !this.#app.runs.has(this.conversation.id)) view.edit();
  }

  /** Answer the last question again. */
  againLast() {
    const node = path(this.conversation).findLast((n) => n.role === "assistant");
    if (node && !this.#app.runs.has(this.conversation.id)) this.#ask(this.conversation, node.parent);
  }

  #results(node, list) {
    let parent = node.id;
    node.answer.calls.forEach((call, i) => {
      parent = add(this.conversation, parent, { role: "tool", call: call.id, content: list[i] }).id;
    });
    this.#ask(this.conversation, parent);
  }

  // An answer without a word is no version worth keeping: it is asked for again in its place.
  #retry(node) {
    if (node.answer.content || node.answer.reasoning) {
      this.#ask(this.conversation, node.parent);
      return;
    }
    node.answer = fresh();
    this.#run(this.conversation, node, this.#body(this.conversation, node.parent));
  }

  #goOn(node) {
    resume(node.answer);
    const body = this.#body(this.conversation, node.id);
    this.#run(this.conversation, node, { ...body, add_generation_prompt: false, continue_final_message: true });
  }

  #ask(conversation, parent) {
    const node = addAnswer(conversation, parent, this.#app.model?.id ?? null);
    this.#run(conversation, node, this.#body(conversation, parent));
  }

  #body(conversation, leaf) {
    const { model, settings } = this.#app;
    const body = {
      model: model?.id,
      messages: messages(conversation, path(conversation, leaf)),
      stream: true, stream_options: { include_usage: true },
      logprobs: true, top_logprobs: 5,
      ...settings.sampling(),
    };
    if (model?.ziphius?.thinking === "optional") body.chat_template_kwargs = { thinking: this.#app.thinks() };
    const tools = model?.ziphius?.tools ? settings.tools() : null;
    return tools ? { ...body, tools } : body;
  }

  #run(conversation, node, body) {
    const app = this.#app;
    let saved = 0;
    app.store.save(conversation);
    app.runs.start(conversation.id, {
      path: "chat/completions", body, key: app.settings.key,
      onChunk: (chunk, now) => {
        take(node.answer, chunk, now);
        if (now - saved > SAVE_EVERY) {
          saved = now;
          app.store.save(conversation);
        }
        this.#dirty.add(node.id);
        this.#draw();
      },
      onEnd: (state, error) => {
        Object.assign(node.answer, { state, error: error && { ...error, until: error.wait ? Date.now() + 1000 * error.wait : null } });
        conversation.changed = Date.now();
        if (app.store.get(conversation.id)) app.store.save(conversation);
        app.notices.say(state === "done" ? `Answer finished: ${node.answer.content.slice(0, 600)}` : "The answer stopped.");
      },
    });
    if (conversation === this.conversation) {
      this.render();
      app.follow.toEnd();
    }
  }
}
