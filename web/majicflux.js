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
};
const CONTROL = "control_after_generate"; // ComfyUI's widget beside a seed
const UI = "majicflux", TEXT_EVENT = "majicflux.text"; // host/comfyui.py sends them
const PANEL = "majicflux_text"; // our widget that shows a text
const BAR = ["#8E6CEF", "#1F9E98", "#B88A00", "#808080"]; // resident, visiting, working, free
const MAJICFLUS = ["majicflus_v1.safetensors", "majicflus_v134.safetensors"]; // one model
const LAST_RUNS = 20; // of the history, in which the opened workflow may be
let texts = {}; // the locale files of all packs, by language
let language = "en";

const isOurs = (node) => node.comfyClass?.startsWith("MajicFlux");
const textOf = (node, input) => texts[language]?.nodeDefs?.[node.comfyClass]?.inputs?.[input];

function useLanguage(chosen) {
    language = chosen;
    // Comfy.Locale itself is stored only once the user has chosen one.
    app.extensionManager.setting.set("MajicFlux.Language", chosen);
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
        .${PANEL}.wrong { color: var(--error-text); }`;
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

// Nodes are made as high as their text needs, and lower again if it was the text that needed it.
function show(node, text, wrong = false, bar = []) {
    let panel = panelOf(node);
    if (!panel && !text) return;
    panel ??= addPanel(node);
    const { element, needed } = panel;
    const fitted = needed.height && node.size[1] <= node.computeSize()[1] + 1;
    element.replaceChildren(...(bar.length ? drawn(bar) : []), text);
    element.classList.toggle("wrong", wrong);
    needed.height = text ? heightOf(element, node.size[0] - 20) + 20 : 0;
    const height = node.computeSize()[1];
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
        width: (value, has) => begins(has) || value("size").includes("("), // a preset has a ratio
        height: (value, has) => begins(has) || value("size").includes("("),
        size: (_, has) => begins(has),
        negative_prompt: (value) => value("cfg") === 1,
        strength: (_, has) => !begins(has),
        keep_unmasked: (_, has) => !has("mask"),
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
        if (node.type !== "MajicFluxDiTLoader" || !MAJICFLUS.includes(named) || files.includes(named)) continue;
        const other = MAJICFLUS.find((file) => files.includes(file));
        if (!other) continue;
        node.widgets_values[0] = other;
        delete node.properties?.models;
    }
}

const said = (key) => texts[language]?.majicflux?.[key] ?? texts.en?.majicflux?.[key] ?? key;

function followRuns() {
    const { api } = app;
    const clear = () => everyNode(app.rootGraph).filter(isOurs).forEach((node) => show(node, ""));
    api.addEventListener(TEXT_EVENT, ({ detail }) => {
        const node = nodeOf(detail.node);
        if (node) show(node, detail.text);
    });
    api.addEventListener("execution_start", clear);
    api.addEventListener("execution_error", ({ detail }) => {
        const node = nodeOf(detail.node_id);
        if (node) show(node, detail.exception_message.trim(), true);
    });
    api.addEventListener("execution_interrupted", ({ detail }) => {
        const node = nodeOf(detail.node_id);
        if (node) show(node, said("stopped"));
    });
    // A prompt that is refused makes no event.
    const { queuePrompt } = api;
    api.queuePrompt = async function (...given) {
        try {
            return await queuePrompt.apply(this, given);
        } catch (error) {
            clear();
            for (const [id, { errors }] of Object.entries(error.response?.node_errors ?? {})) {
                const node = nodeOf(id);
                const lines = new Set(errors.map((found) => found.details || found.message));
                if (node) show(node, [...lines].join("\n"), true);
            }
            throw error;
        }
    };
}

// What the workflow that was opened reported last, as before the page was reloaded.
async function showLastRun() {
    const id = app.rootGraph.id;
    const history = await (await app.api.fetchApi(`/history?max_items=${LAST_RUNS}`)).json();
    const runs = Object.values(history).filter((run) => run.prompt[3].extra_pnginfo?.workflow?.id === id);
    for (const [key, output] of Object.entries(runs.at(-1)?.outputs ?? {})) {
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
        app.ui.settings.addEventListener("Comfy.Locale.change", (e) => useLanguage(e.detail.value));
        useLanguage(app.extensionManager.setting.get("Comfy.Locale"));
        texts = await (await app.api.fetchApi("/i18n")).json();
    },

    setup() {
        addColors();
        followRuns();
    },

    beforeConfigureGraph: useFileThatIsThere,
    afterConfigureGraph: showLastRun,

    onNodeOutputsUpdated(outputs) {
        for (const [id, output] of Object.entries(outputs)) showReport(nodeOf(id), output);
    },

    beforeRegisterNodeDef(nodeType, nodeData) {
        // The canvas itself translates all tooltips but those of text boxes.
        if (isOurs(nodeType))
            for (const inputs of Object.values(nodeData.input))
                for (const [name, [, options]] of Object.entries(inputs)) {
                    const tooltip = textOf(nodeType, name)?.tooltip;
                    if (options && tooltip) options.tooltip = tooltip;
                }
        if (!isOurs(nodeType)) return;
        const { onExecuted } = nodeType.prototype;
        nodeType.prototype.onExecuted = function (output) {
            onExecuted?.call(this, output);
            showReport(this, output);
        };
    },

    nodeCreated(node) {
        if (!isOurs(node)) return;
        watchIdle(node);
        for (const widget of node.widgets ?? []) {
            const labels = textOf(node, widget.name)?.options;
            if (widget.name === CONTROL) widget.tooltip = textOf(node, CONTROL)?.tooltip;
            if (widget.element?.placeholder) widget.element.placeholder = widget.label;
            if (widget.type === "combo" && labels)
                widget.options.getOptionLabel = (value) => labels[value] ?? value ?? "";
            if (widget.type === "toggle" && language !== "en" && labels)
                Object.assign(widget.options, { on: labels.true, off: labels.false });
        }
    },
});
