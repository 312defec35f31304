"""How the web page looks: system fonts, one accent colour, light and dark, from a phone's width up."""

import gradio as gr

FONTS = [
    "system-ui",
    "-apple-system",
    "Segoe UI",
    "PingFang SC",
    "Hiragino Sans GB",
    "Microsoft YaHei",
    "Noto Sans CJK SC",
    "sans-serif",
]
MONO = ["ui-monospace", "SFMono-Regular", "Consolas", "Noto Sans Mono CJK SC", "monospace"]

THEME = gr.themes.Base(
    primary_hue="teal",
    secondary_hue="teal",
    neutral_hue="slate",
    radius_size="md",
    font=FONTS,
    font_mono=MONO,
).set(
    body_background_fill="*neutral_50",
    body_background_fill_dark="*neutral_950",
    block_background_fill="white",
    block_background_fill_dark="*neutral_900",
    block_border_width="1px",
    block_border_color="*neutral_200",
    block_border_color_dark="*neutral_800",
    block_shadow="none",
    block_label_background_fill="transparent",
    block_label_border_width="0px",
    block_label_text_color="*neutral_500",
    block_title_text_weight="500",
    block_title_text_color="*neutral_700",
    block_title_text_color_dark="*neutral_200",
    block_info_text_size="*text_xs",
    block_info_text_color="*neutral_500",
    block_info_text_color_dark="*neutral_400",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_text_color="white",
    input_background_fill="white",
    input_background_fill_dark="*neutral_900",
    input_border_width="1px",
    input_border_color="*neutral_300",
    input_border_color_dark="*neutral_700",
    input_border_color_focus="*primary_600",
    slider_color="*primary_600",
    chatbot_text_size="15px",
)

CSS = """
.gradio-container { width: 100%; max-width: 1280px !important; margin: 0 auto; padding: 0 !important; }
.gradio-container .app { width: 100%; max-width: none !important; padding: 0 !important; }
.gradio-container main { width: 100%; max-width: none !important; padding: 14px 20px 20px !important; }
#head { align-items: center; flex-wrap: nowrap; }
#title h1 { font-size: 20px; font-weight: 650; margin: 0; line-height: 1.3; }
#title p { margin: 2px 0 0; font-size: 13px; color: var(--block-info-text-color); overflow-wrap: anywhere; }
#language { flex: 0 0 auto; min-width: 0 !important; width: auto; border: 0; padding: 0; background: none; }
#language .wrap { flex-wrap: nowrap; gap: 4px; }
#language label { padding: 4px 10px; font-size: 13px; border-radius: 999px; box-shadow: none; }
#language input { display: none; }
#language label:has(input:checked) { background: var(--primary-700); color: white; }
#language label span { margin: 0; }

.chat { height: clamp(280px, calc(100dvh - 440px), 900px) !important; }
.chat .placeholder { max-width: 34em; margin: auto; text-align: center; }
/* copying a user's message would copy the escapes that keep Markdown off it */
.chat:not(:has(textarea)) .message-buttons-right button:first-child { display: none; }
.status { min-height: 20px; padding: 0 4px !important; margin-top: -8px; }
.status .html-container, .status .prose { padding: 0 !important; }
#examples .gallery { gap: 8px; }
#examples .gallery-item { font-size: 13px; padding: 4px 10px; border-radius: 999px; white-space: nowrap; }
.status p { margin: 0; font-size: 12.5px; line-height: 20px; color: var(--block-info-text-color);
  font-variant-numeric: tabular-nums; }
#notice:not(:has(p)) { display: none; }
#notice p { margin: 0; color: #92400e; background: #fffbeb; border: 1px solid #fde68a; border-radius: 6px;
  padding: 6px 10px; font-size: 13.5px; }
.dark #notice p { color: #fcd34d; background: #422006; border-color: #78350f; }

#run .empty { text-align: center; padding: 64px 16px; color: var(--block-info-text-color); }
#run .empty pre { display: inline-block; padding: 8px 14px; border-radius: 6px;
  background: var(--background-fill-secondary); }
#run .cards { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 14px; }
#run .card { border: 1px solid var(--block-border-color); border-radius: 10px; padding: 16px 18px;
  background: var(--block-background-fill); }
#run .wide { grid-column: 1 / -1; }
#run h3 { font-size: 15px; font-weight: 600; margin: 0 0 2px; }
#run .note { font-size: 12.5px; margin: 0 0 10px; color: var(--block-info-text-color); overflow-wrap: anywhere; }
#run img { width: 100%; border-radius: 6px; background: white; }
#run table { width: 100%; border: 0 !important; border-collapse: collapse; font-size: 14px;
  font-variant-numeric: tabular-nums; }
#run th { font-weight: 500; font-size: 12.5px; color: var(--block-info-text-color); }
#run tr { border: 0 !important; }
#run th, #run td { text-align: right; padding: 6px 4px; border: 0; border-bottom: 1px solid var(--block-border-color); }
#run tr > :first-child { text-align: left; }
#run tr:last-child td { border-bottom: 0; }
#run td:nth-child(3) { font-weight: 600; }
#run dl { margin: 0; display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 4px 14px; font-size: 14px; }
#run dt { color: var(--block-info-text-color); font-size: 13px; line-height: 1.55; }
#run dd { margin: 0; line-height: 1.55; overflow-wrap: anywhere; white-space: pre-wrap; }
#run .settings dt, #run .settings dd { font-family: var(--font-mono); font-size: 12.5px; }
#run .sample { padding: 12px 0; border-top: 1px solid var(--block-border-color); }
#run .sample .prompt { font-weight: 600; }
#run .sample .base { color: var(--block-info-text-color); }

@media (max-width: 700px) {
  .gradio-container main { padding: 10px 10px 16px !important; }
  #title h1 { font-size: 17px; }
  #title { min-width: 0; }
  #examples .gallery-item { white-space: normal; border-radius: 10px; text-align: left; }
  .chat { height: clamp(260px, 46dvh, 480px) !important; }
  #run .cards { grid-template-columns: minmax(0, 1fr); }
  #run .settings { grid-template-columns: minmax(0, 1fr); gap: 0; }
  #run .settings dd { margin-bottom: 6px; }
}
"""

# A field in which a message is edited shows the message, not the escapes that keep Markdown off it.
PLAIN_EDITING = r"""() => new MutationObserver(() => {
  for (const field of document.querySelectorAll(".chat textarea:not([data-plain])")) {
    field.dataset.plain = "";
    field.value = field.value.replace(/\\([!-/:-@\[-`{-~])/g, "$1");
    field.dispatchEvent(new Event("input", { bubbles: true }));
  }
}).observe(document.body, { childList: true, subtree: true })"""
