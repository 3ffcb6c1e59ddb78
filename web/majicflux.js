// What ComfyUI's canvas does not do for a node pack by itself: the options of combos in the user's
// language, colours for the pack's own socket types, the language for the server's messages, and
// texts that stay on their nodes: what a run does, what it reported, and what was wrong. Inputs that
// would change nothing are hidden, rare ones are folded away.
import { app } from "../../scripts/app.js";

// Legible on the nodes of light and of dark palettes.
const COLORS = {
    MAJICFLUX_DIT: "#8E6CEF",
    MAJICFLUX_TEXT_ENCODERS: "#B88A00",
    MAJICFLUX_VAE: "#E0565B",
    MAJICFLUX_PIPELINE: "#1F9E98",
    MAJICFLUX_CONTROL: "#3D85C6",
};
const CONTROL = "control_after_generate"; // ComfyUI's widget beside a seed
const UI = "majicflux", TEXT_EVENT = "majicflux.text"; // host/comfyui.py sends them
const PANEL = "majicflux_text"; // our widget that shows a text
const BAR = ["#8E6CEF", "#1F9E98", "#B88A00", "#808080"]; // resident, visiting, working, free
const SISTERS = [ // files of one model
    ["majicflus_v1.safetensors", "majicflus_v134.safetensors"],
    ["flux1-dev-kontext_fp8_scaled.safetensors", "flux1-kontext-dev.safetensors"],
];
const TEMPLATES = [ // from simple to special
    "text_to_image", "text_to_image_6gb", "text_to_image_lora", "text_to_image_translated",
    "image_to_image", "inpainting", "kontext_edit", "fill_inpainting", "fill_outpainting",
    "redux_variation", "depth_control_lora", "controlnet_union_canny", "batch_with_a_grid",
    "compare_precisions", "mixed_with_stock_nodes",
];
const FOUND_FIRST = ["MajicFluxDiTLoader", "MajicFluxSample"]; // in a search, of ours
const RUN = "majicflux_run"; // in `extra` of a workflow: the run that it is of
const DOCTOR_WIDTH = 480; // its text has long lines, and many
const BOX = 110; // of a prompt in Nodes 2.0, at least; pixels
const LAST_RUNS = 20; // of the history, in which that may be
const graphs = new Map(); // of the prompts that this page has queued
let running; // the prompt
let refused = {}; // the errors of the prompt that was queued last, by node
let texts = {}; // the locale files of all packs, by language

const isOurs = (node) => node.comfyClass?.startsWith("MajicFlux");
const language = () => app.extensionManager.setting.get("Comfy.Locale");
const textOf = (node, input) => texts[language()]?.nodeDefs?.[node.comfyClass]?.inputs?.[input];

// Comfy.Locale itself is stored only once the user has chosen one.
function storeLanguage() {
    const { setting } = app.extensionManager;
    if (setting.get("MajicFlux.Language") !== language()) setting.set("MajicFlux.Language", language());
}

function addColors() {
    // A change of the palette empties the colours of all types that it does not name.
    for (const table of [LGraphCanvas.link_type_colors, app.canvas.default_connection_color_byType])
        for (const [type, color] of Object.entries(COLORS)) {
            let chosen = color;
            Object.defineProperty(table, type, {
                enumerable: true,
                get: () => chosen,
                set: (value) => (chosen = value || color),
            });
        }
    const style = document.head.appendChild(document.createElement("style"));
    const rules = Object.entries(COLORS).map(([type, color]) => `--color-datatype-${type}: ${color};`);
    style.textContent = `:root { ${rules.join(" ")} }
        .${PANEL} { box-sizing: border-box; overflow: hidden; padding: 4px 6px; white-space: pre-wrap;
            font: 12px/1.35 sans-serif; color: var(--input-text); overflow-wrap: anywhere; user-select: text; }
        .${PANEL} .bar { display: flex; height: 8px; margin: 2px 0; border-radius: 3px; overflow: hidden; }
        .${PANEL}.wrong { color: color-mix(in srgb, var(--error-text), var(--input-text)); }`;
}

const everyNode = (graph) =>
    graph.nodes.flatMap((node) => (node.subgraph ? [node, ...everyNode(node.subgraph)] : [node]));

// By the id of a run, which names the subgraphs on the way: "5:3".
function nodeOf(id) {
    let node;
    let graph = app.rootGraph;
    for (const part of String(id).split(":")) {
        node = graph?.getNodeById(part);
        graph = node?.subgraph;
    }
    return node && isOurs(node) ? node : null;
}

function addPanel(node) {
    const element = document.createElement("div");
    element.className = PANEL;
    element.tabIndex = 0; // its text can be selected and copied
    element.addEventListener("pointerdown", (event) => event.stopPropagation());
    const needed = { height: 0 };
    const getHeight = () => needed.height;
    const panel = node.addDOMWidget(PANEL, PANEL, element, {
        serialize: false,
        hideOnZoom: false,
        getMinHeight: getHeight,
        getMaxHeight: getHeight,
    });
    return Object.assign(panel, { serialize: false, needed });
}

function heightOf(element, width) {
    const probe = document.body.appendChild(element.cloneNode(true));
    Object.assign(probe.style, { position: "absolute", visibility: "hidden", width: `${width}px`, height: "auto" });
    const height = probe.offsetHeight;
    probe.remove();
    return height;
}

const panelOf = (node) => node.widgets?.find((widget) => widget.name === PANEL);
const textOn = (node) => panelOf(node)?.element.textContent;

// Each part of a plan as wide as its share, and its name with its colour.
function drawn(parts) {
    const bar = document.createElement("div");
    const legend = document.createElement("div");
    bar.className = "bar";
    parts.forEach(([name, bytes], index) => {
        const part = bar.appendChild(document.createElement("div"));
        part.style.cssText = `flex: ${bytes} 0 0; background: ${BAR[index]}`;
        const mark = legend.appendChild(document.createElement("span"));
        mark.textContent = `■ ${name} ${(bytes / 2 ** 30).toFixed(2)} GB  `;
        mark.style.color = BAR[index];
    });
    return [bar, legend];
}

// Nodes 2.0 gives a text box less room than the classic canvas, which knows no smaller one.
function heightNeeded(node) {
    const box = LiteGraph.vueNodesMode && node.widgets.some((widget) => widget.element?.tagName === "TEXTAREA");
    return node.computeSize()[1] + (box ? BOX : 0);
}

// Nodes are made as high as their text needs, and lower again if it was the text that needed it.
function show(node, text, wrong = false, bar = []) {
    let panel = panelOf(node);
    if (!panel && !text) return;
    panel ??= addPanel(node);
    const { element, needed } = panel;
    const fitted = needed.height && node.size[1] <= heightNeeded(node) + 1;
    element.replaceChildren(...(bar.length ? drawn(bar) : []), text);
    element.classList.toggle("wrong", wrong);
    needed.height = text ? heightOf(element, node.size[0] - 20) + 20 : 0;
    const height = heightNeeded(node);
    node.setSize([node.size[0], fitted ? height : Math.max(node.size[1], height)]);
    node.setDirtyCanvas(true, true);
}

function showReport(node, output) {
    const reports = output?.[UI];
    if (!node || !reports) return;
    const text = reports.map((report) => report.text).join("\n");
    show(node, text, false, reports.at(-1).bar);
}

// By node and widget: when a value would change nothing. `has`: whether an input is linked.
const begins = (has) => has("image") || has("latent");
const IDLE = {
    MajicFluxSample: {
        prompt: (_, has) => has("positive"),
        width: (value, has) => begins(has) || value("size").includes("("), // a preset has a ratio
        height: (value, has) => begins(has) || value("size").includes("("),
        size: (_, has) => begins(has),
        negative_prompt: (value, has) => value("cfg") === 1 || has("negative"),
        strength: (_, has) => !begins(has),
        keep_unmasked: (_, has) => !has("mask"),
        reused_steps: (value) => !["chosen", ""].includes(value("reuse")),
    },
    MajicFluxDenoise: {
        reused_steps: (value) => !["chosen", ""].includes(value("reuse")),
    },
};

function hideIdle(node) {
    const rules = IDLE[node.comfyClass];
    if (!rules || !node.widgets) return;
    const has = (name) => {
        const slot = node.findInputSlot(name);
        return slot >= 0 && node.isInputConnected(slot);
    };
    // A value that comes by a link is not known here.
    const value = (name) => (has(name) ? "" : node.widgets.find((widget) => widget.name === name)?.value);
    let changed = false;
    for (const widget of node.widgets) {
        const hidden = !!rules[widget.name]?.(value, has) && !has(widget.name);
        changed ||= hidden !== !!widget.hidden;
        widget.hidden = widget.options.hidden = hidden;
    }
    if (changed) node.setDirtyCanvas(true, true);
}

function watchIdle(node) {
    for (const widget of node.widgets ?? []) {
        if (widget.options.advanced) widget.advanced = true; // older canvases fold away no other
        const { callback } = widget;
        widget.callback = function (...given) {
            const result = callback?.apply(this, given);
            hideIdle(node);
            return result;
        };
    }
    const { onConnectionsChange, onConfigure } = node;
    node.onConnectionsChange = function (...given) {
        onConnectionsChange?.apply(this, given);
        hideIdle(node);
    };
    node.onConfigure = function (...given) {
        onConfigure?.apply(this, given);
        hideIdle(node);
    };
    hideIdle(node);
}

// The file that is there stands in for the one that a workflow names.
function useFileThatIsThere(workflow) {
    const offered = LiteGraph.registered_node_types.MajicFluxDiTLoader?.nodeData.input.required.file;
    const files = Array.isArray(offered?.[0]) ? offered[0] : (offered?.[1].options ?? []);
    const nodes = [workflow, ...(workflow.definitions?.subgraphs ?? [])].flatMap((graph) => graph.nodes ?? []);
    for (const node of nodes) {
        const named = node.widgets_values?.[0];
        const sisters = SISTERS.find((names) => names.includes(named));
        if (node.type !== "MajicFluxDiTLoader" || !sisters || files.includes(named)) continue;
        const other = sisters.find((file) => files.includes(file));
        if (!other) continue;
        node.widgets_values[0] = other;
        delete node.properties?.models;
    }
}

const said = (key) => texts[language()]?.majicflux?.[key] ?? texts.en?.majicflux?.[key] ?? key;

const ourNodes = () => everyNode(app.rootGraph).filter(isOurs);

// Another workflow may have been opened while a prompt of this page runs.
const runsHere = () => (graphs.get(running) ?? app.rootGraph.id) === app.rootGraph.id;

function followRuns() {
    const { api } = app;
    const on = (event, id, text, wrong) =>
        api.addEventListener(event, ({ detail }) => {
            const node = runsHere() && nodeOf(detail[id]);
            if (node) show(node, text(detail), wrong);
        });
    api.addEventListener("execution_start", ({ detail }) => {
        running = detail.prompt_id;
        if (!runsHere()) return;
        for (const node of ourNodes()) show(node, "");
        showRefused();
    });
    on(TEXT_EVENT, "node", ({ text }) => text);
    on("execution_error", "node_id", ({ exception_message }) => exception_message.trim(), true);
    on("execution_interrupted", "node_id", () => said("stopped"));
    // No event tells of what is refused.
    const { queuePrompt } = api;
    api.queuePrompt = async function (number, prompt, ...rest) {
        const graph = app.rootGraph.id;
        const run = { [RUN]: crypto.getRandomValues(new Uint32Array(2)).join("-") };
        for (const owner of ourNodes().length ? [app.rootGraph, prompt.workflow] : []) if (owner) owner.extra = { ...owner.extra, ...run };
        refused = {};
        // Now: the answer may come after what a fast run had to say.
        for (const node of ourNodes()) if (panelOf(node)?.element.classList.contains("wrong")) show(node, "");
        try {
            const queued = await queuePrompt.call(this, number, prompt, ...rest);
            graphs.set(queued.prompt_id, graph);
            showRefused(queued.node_errors);
            return queued;
        } catch (error) {
            showRefused(error.response?.node_errors);
            throw error;
        }
    };
}

function showRefused(errorsOfNodes = refused) {
    refused = errorsOfNodes ?? {};
    for (const [id, { errors }] of Object.entries(refused)) {
        const node = nodeOf(id);
        if (node) show(node, [...new Set(errors.map((error) => sentence(node, error)))].join("\n"), true);
    }
}

// Ours stand behind the name of an input; the rest are ComfyUI's own, which are English.
function sentence(node, { type, message, details, extra_info }) {
    const { input_name: input, input_config: config, received_value: value } = extra_info ?? {};
    const fields = { INPUT: textOf(node, input)?.name ?? input, VALUE: value, ...config?.[1] };
    const filled = (key) => said(key).replace(/INPUT|VALUE|min|max/g, (name) => fields[name]);
    if (type === "custom_validation_failed") return details.replace(`${input} - `, "");
    if (type === "required_input_missing") return filled("missing");
    if (/^value_(smaller|bigger)/.test(type)) return filled("outside");
    if (type === "value_not_in_list") return filled("choice");
    return details ? `${message}: ${details}` : message;
}

// A search lists what matches alike by how often it is used, which nobody has counted for our nodes.
function rankInSearch() {
    const kind = Object.getPrototypeOf(LiteGraph.registered_node_types.MajicFluxSample?.nodeData ?? {});
    const { postProcessSearchScores } = kind;
    if (!postProcessSearchScores) return;
    kind.postProcessSearchScores = function (scores) {
        const [match, frequency, ...rest] = postProcessSearchScores.call(this, scores);
        const rank = FOUND_FIRST.toReversed().indexOf(this.name) + 1;
        return [match, frequency - rank / 100, ...rest];
    };
}

// The server lists templates as they lie on the disk.
function sortTemplates() {
    const folder = decodeURIComponent(import.meta.url).split("/").at(-2);
    const { getWorkflowTemplates } = app.api;
    app.api.getWorkflowTemplates = async function () {
        const found = await getWorkflowTemplates.call(this);
        found[folder]?.sort((a, b) => TEMPLATES.indexOf(a) - TEMPLATES.indexOf(b));
        return found;
    };
}

const nextFrame = () => new Promise(requestAnimationFrame);

// The canvas shows the whole of a template, however small; a large one of ours begins legibly.
function openTemplatesLegibly() {
    const { loadGraphData } = app;
    app.loadGraphData = async function (graph, clean, restore, workflow, options, ...rest) {
        const loaded = await loadGraphData.call(this, graph, clean, restore, workflow, options, ...rest);
        if (options?.openSource !== "template" || !ourNodes().length) return loaded;
        await nextFrame();
        await nextFrame(); // which the canvas chooses its view in
        const { ds } = app.canvas;
        const { scale, offset } = graph.extra?.ds ?? {};
        if (ds.scale < scale) Object.assign(ds, { scale, offset });
        app.canvas.setDirty(true, true);
        return loaded;
    };
}

// What a workflow reported when it ran last, after a reload or as the workflow of a picture.
async function showLastRun() {
    const id = app.rootGraph.extra?.[RUN];
    if (!id) return;
    const history = await (await app.api.fetchApi(`/history?max_items=${LAST_RUNS}`)).json();
    const run = Object.values(history).find((run) => run.prompt[3].extra_pnginfo?.workflow?.extra?.[RUN] === id);
    for (const [key, output] of Object.entries(run?.outputs ?? {})) {
        const node = nodeOf(key);
        if (node && !textOn(node)) showReport(node, output);
    }
}

app.registerExtension({
    name: "MajicFlux",
    settings: [
        { id: "MajicFlux.Language", name: "MajicFlux: language", type: "hidden", defaultValue: "" },
    ],

    async init() {
        storeLanguage();
        sortTemplates();
        texts = await (await app.api.fetchApi("/i18n")).json();
    },

    setup() {
        addColors();
        followRuns();
        openTemplatesLegibly();
        rankInSearch();
    },

    beforeConfigureGraph: useFileThatIsThere,
    afterConfigureGraph: showLastRun,

    onNodeOutputsUpdated(outputs) {
        for (const [id, output] of Object.entries(outputs)) showReport(nodeOf(id), output);
    },

    beforeRegisterNodeDef(nodeType, nodeData) {
        if (!isOurs(nodeType)) return;
        storeLanguage(); // nodes are registered anew when it changes
        // The canvas itself translates all tooltips but those of text boxes.
        for (const inputs of Object.values(nodeData.input))
            for (const [name, [, options]] of Object.entries(inputs)) {
                const tooltip = textOf(nodeType, name)?.tooltip;
                if (options && tooltip) options.tooltip = tooltip;
            }
        // The classic canvas keeps room for inputs that are folded away.
        nodeType.prototype.getLayoutWidgets = function () {
            return this.widgets?.filter((widget) => this.collapsed || this.isWidgetVisible(widget)) ?? [];
        };
        const { onExecuted } = nodeType.prototype;
        nodeType.prototype.onExecuted = function (output) {
            onExecuted?.call(this, output);
            showReport(this, output);
        };
    },

    nodeCreated(node) {
        if (!isOurs(node)) return;
        watchIdle(node);
        // The app view shows only widgets that are there when it opens.
        if (node.comfyClass === "MajicFluxTranslate")
            addPanel(node).label =
                texts[language()]?.nodeDefs?.[node.comfyClass]?.outputs?.[0]?.name ?? node.outputs[0].name;
        if (node.comfyClass === "MajicFluxDoctor") node.setSize([DOCTOR_WIDTH, node.size[1]]);
        for (const widget of node.widgets ?? []) {
            const labels = textOf(node, widget.name)?.options;
            if (widget.name === CONTROL) widget.tooltip = textOf(node, CONTROL)?.tooltip;
            if (widget.element?.placeholder) widget.element.placeholder = widget.label;
            if (widget.type === "combo" && labels)
                widget.options.getOptionLabel = (value) => labels[value] ?? value ?? "";
            if (widget.type === "toggle" && language() !== "en" && labels)
                Object.assign(widget.options, { on: labels.true, off: labels.false });
        }
    },
});
