// What ComfyUI's canvas does not do for a node pack by itself: the options of combos in the user's
// language, colours for the pack's own socket types, and the language for the server's messages.
import { app } from "../../scripts/app.js";

// Legible on the nodes of light and of dark palettes.
const COLORS = {
    MAJICFLUX_DIT: "#8E6CEF",
    MAJICFLUX_TEXT_ENCODERS: "#B88A00",
    MAJICFLUX_VAE: "#E0565B",
    MAJICFLUX_PIPELINE: "#1F9E98",
};
const CONTROL = "control_after_generate"; // ComfyUI's widget beside a seed
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
    style.textContent = `:root { ${rules.join(" ")} }`;
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

    setup: addColors,

    beforeRegisterNodeDef(nodeType, nodeData) {
        // The canvas itself translates all tooltips but those of text boxes.
        if (isOurs(nodeType))
            for (const inputs of Object.values(nodeData.input))
                for (const [name, [, options]] of Object.entries(inputs)) {
                    const tooltip = textOf(nodeType, name)?.tooltip;
                    if (options && tooltip) options.tooltip = tooltip;
                }
    },

    nodeCreated(node) {
        if (!isOurs(node)) return;
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
